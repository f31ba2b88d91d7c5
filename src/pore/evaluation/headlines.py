"""The first screens of the pages: one number, and what was found in plain sentences.

The sentences follow from the numbers alone, and what does not flatter stands among them. The number
is of the budget that was fixed beforehand, or of the middle one, whatever came out there.
"""

from __future__ import annotations

from collections.abc import Sequence

from pore._numbers import interval, percent, points
from pore.evaluation import tables
from pore.evaluation.differences import Difference
from pore.evaluation.metrics import METRICS
from pore.evaluation.parts import is_own
from pore.evaluation.records import Record
from pore.evaluation.statistics import holm
from pore.evaluation.wording import score
from pore.plotting.labels import UNPRUNED, budget_label, label

BASELINES = ("Random", "Downsample")
"""Methods that choose nothing: what a method is worth shows beside them."""


def name(record: Record) -> str:
    """A method in words."""
    return label(record["method"], record["reweight"])


def told(record: Record) -> str:
    """A method and its accuracy, such as "FastV + PoRe 71.2 %"."""
    return f"{name(record)} {percent(record['accuracy'])} %"


def effects(differences: Sequence[Difference], host: str) -> str:
    """What PoRe does to a host, budget by budget, as one sentence.

    Args:
        differences: The host with P compared with itself, over all questions.
        host: The host in words.
    """
    said = []
    better = [d for d in differences if d.paired.clear and d.paired.difference > 0]
    worse = [d for d in differences if d.paired.clear and d.paired.difference < 0]
    graded = any(METRICS[d.second.metric].graded for d in differences)
    words = (
        ("higher scores", "lower scores")
        if graded
        else ("more questions right", "fewer questions right")
    )
    for verdict, chosen in zip(words, (better, worse), strict=True):
        if chosen:
            some = listed(
                f"{budget_label(d.second.keep)} ({points(d.paired.difference)} points)"
                for d in chosen
            )
            said.append(f"clearly {verdict} at {some}")
    lines = [f"With PoRe, {host} gets {' and '.join(said)}."] if said else []
    unclear = [d for d in differences if not d.paired.clear]
    if unclear:
        some = listed(budget_label(d.second.keep) for d in unclear)
        lines.append(f"{'It' if said else 'PoRe'} makes no clear difference at {some}.")
    return " ".join(lines)


def standing(records: Sequence[Record], block: Sequence[Record], chosen: Record) -> str:
    """Where a method stands beside the unpruned model and the others, as sentences.

    Args:
        records: All records, that of the unpruned model first.
        block: Those at one budget.
        chosen: The method, one of them.
    """
    unpruned = records[0]
    lost = unpruned["accuracy"] - chosen["accuracy"]
    first = (
        f"At {budget_label(chosen['keep'])}, {name(chosen)} {score(chosen)}, and the unpruned "
        f"model {percent(unpruned['accuracy'])} %"
    )
    first += f": {percent(lost)} points are lost." if lost > 0 else "."
    ahead = [r for r in block if r is not chosen and r["accuracy"] > chosen["accuracy"]]
    if not ahead:
        return f"{first} No other method asked at this budget gets more."
    ahead.sort(key=lambda record: -float(record["accuracy"]))
    more = "gets more" if len(ahead) == 1 else "get more"
    return f"{first} At the same budget {listed(map(told, ahead[:3]))} {more}."


def by_chance(records: Sequence[Record]) -> str:
    """At which budgets a method that chooses nothing does as well as PoRe or better."""
    budgets: dict[str, list[str]] = {}
    groups = tables.groups(records[1:])
    for budget, block in groups:
        ours = max((r["accuracy"] for r in block if is_own(r)), default=None)
        for record in block:
            if ours is not None and record["method"] in BASELINES and record["accuracy"] >= ours:
                budgets.setdefault(record["method"], []).append(budget)
    said = [
        f"{name} at {'every budget' if len(found) == len(groups) else listed(found)}"
        for name, found in budgets.items()
    ]
    return f"As good or better without choosing: {listed(said)}." if said else ""


def middle(records: Sequence[Record]) -> list[Record]:
    """The records at the middle budget, the larger of two."""
    groups = [block for _, block in tables.groups(records) if block[0]["method"] != UNPRUNED]
    return groups[(len(groups) - 1) // 2] if groups else []


def best_of(block: Sequence[Record]) -> list[Record]:
    """The methods at one budget that choose tokens by themselves, the best first.

    One that another model guides, at a cost that is not counted, is none of them.
    """
    own = (r for r in block if r["method"] not in BASELINES and not r["guide"])
    choosing = list(own) or list(block)
    return sorted(choosing, key=lambda record: -float(record["accuracy"]))


def verdict_counts(differences: Sequence[Difference]) -> str:
    """How often PoRe helps its host, harms it or does nothing clear, as a sentence."""
    whole = [d for d in differences if d.third is None]
    corrected = holm([d.paired.p for d in whole])
    better = [d for d in whole if d.paired.clear and d.paired.difference > 0]
    worse = [d for d in whole if d.paired.clear and d.paired.difference < 0]
    sure = sum(p < 0.05 for p in corrected)
    said = (
        f"PoRe makes its host clearly better in {len(better)} of {len(whole)} comparisons, clearly "
        f"worse in {len(worse)}, and no clear difference in {len(whole) - len(better) - len(worse)}"
        f"; corrected for their number, {sure} stay clear."
    )
    if worse:
        named = (
            f"{d.second.method} at {budget_label(d.second.keep)} ({points(d.paired.difference)})"
            for d in sorted(worse, key=lambda d: d.paired.difference)[:4]
        )
        said += f" It harms {listed(named)}" + (" and others." if len(worse) > 4 else ".")
    return said


def accuracy_of(record: Record) -> tuple[str, str]:
    """An accuracy as the number of a page, and its interval."""
    return percent(record["accuracy"]), f"{interval(record['ci'])}, 95 % interval"


def difference_of(difference: Difference) -> tuple[str, str]:
    """A difference as the number of a page, and its interval."""
    paired = difference.paired
    return points(paired.difference), f"{difference.interval}, 95 % interval"


def listed(texts: object) -> str:
    """Texts as a list in a sentence: "a, b and c"."""
    *most, last = [str(text) for text in texts]  # type: ignore[attr-defined]
    return f"{', '.join(most)} and {last}" if most else last
