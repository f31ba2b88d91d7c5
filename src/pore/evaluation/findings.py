"""What an evaluation found, in sentences that follow from its numbers alone."""

from __future__ import annotations

from collections.abc import Sequence

from pore._numbers import interval, number, percent, points
from pore._text import capitalised
from pore.bias.any_size import AnySizeBias
from pore.evaluation import tables
from pore.evaluation.differences import Difference
from pore.evaluation.records import Record
from pore.evaluation.results import DemoResult, SurveyResult
from pore.evaluation.wording import score
from pore.plotting.labels import (
    EXPERIMENTAL,
    GUIDED,
    TAUGHT,
    budget_label,
    label,
    marks,
)

BETTER, WORSE = "clearly better than", "clearly worse than"


UNCLEAR = "not clearly different from the one"


def findings(result: SurveyResult) -> list[str]:
    """What a survey found, in sentences.

    Args:
        result: Its result.

    Returns:
        The sentences.
    """
    unpruned, *pruned = result.records
    lines = [
        f"Unpruned, the model {score(unpruned)}.",
        *skips(result.records),
    ]
    for budget, block in tables.groups(pruned):
        best = sorted(block, key=lambda record: -float(record["accuracy"]))[:3]
        named = ", ".join(
            f"{label(r['method'], r['reweight'])}{marks(r, result.taught)} "
            f"{percent(r['accuracy'])} {interval(r['ci'])}"
            for r in best
        )
        lines.append(f"{capitalised(budget)}: the best (%) are {named}.")
    whole = [d for d in result.differences if d.third is None]
    for verdict, chosen in _judged(whole):
        hosts: dict[str, list[str]] = {}
        for d in chosen:
            name = d.second.method + marks(d.record(), result.taught)
            by = "" if verdict == UNCLEAR else f" {points(d.paired.difference)} points {d.interval}"
            hosts.setdefault(name, []).append(f"{budget_label(d.second.keep)}{by}")
        named = "; ".join(f"{name}: {', '.join(budgets)}" for name, budgets in hosts.items())
        lines.append(f"With PoRe a host is {verdict} without, on the same questions: {named}.")
    return lines


def facts(result: DemoResult) -> list[str]:
    """What the demo found before any comparison, in sentences.

    Args:
        result: What the demo found.

    Returns:
        The sentences.
    """
    unpruned = result.records[0]
    return [
        f"Unpruned, the model {score(unpruned)}.",
        *skips(result.records),
        bias_found(result),
        *(f"{name} was left out: {reason}" for name, reason in result.left_out.items()),
    ]


def bias_found(result: DemoResult) -> str:
    """Which part of an image P favours, and how well it fits."""
    bias = result.bias
    if isinstance(bias, AnySizeBias):
        power = bias.parameters["power"]
        return (
            f"P, fitted to the mean attention of images of {bias.sizes[0]} to {bias.sizes[1]} "
            f"visual tokens, is the distance to the text to the power of {power:.2f}: a visual "
            f"token twice as far from the text gets {2**power:.2f} times the attention."
        )
    growth = bias.growth
    fitted = f"R² = {bias.r2:.2f}" if bias.r2 is not None else "not fitted"
    if growth >= 1:
        favoured = f"the last visual token over the first by a factor of {growth:.2f}"
    else:
        favoured = f"the first visual token over the last by a factor of {1 / growth:.2f}"
    rate = bias.parameters.get("rate")
    of = "" if rate is None else f", rate b = {rate:+.5f} per token"
    return f"P, fitted to the mean attention, favours {favoured}{of} ({fitted})."


def skips(records: Sequence[Record]) -> list[str]:
    """Which samples were skipped for every method, as a sentence; empty if none was."""
    skipped = records[0]["skipped"]
    if not skipped:
        return []
    some = "; ".join(f"{one['id']} ({one['reason']})" for one in skipped[:5])
    more = f"; and {len(skipped) - 5} more, named in results.json" if len(skipped) > 5 else ""
    count = len(skipped) + records[0]["n"]
    bad = f"{len(skipped)} of {count} samples are bad"
    return [f"{bad} and were left out for every method: {some}{more}"]


def footnotes(records: Sequence[Record], taught: int | None = None) -> list[str]:
    """Footnotes to the marks in a table.

    Args:
        records: The records of the table, that of the unpruned model first.
        taught: As in `pore.plotting.labels.marks`.

    Returns:
        A sentence for every mark that occurs.
    """
    marked = "".join(marks(record, taught) for record in records)
    lines = []
    if TAUGHT in marked:
        lines.append(
            f"{TAUGHT} Looks at decoder layer {taught} or above. The attention of layer "
            f"{taught} was supervised while this model was trained, so the method sees "
            "better attention than in a real model (docs/embedded-model.md)."
        )
    if EXPERIMENTAL in marked:
        lines.append(
            f"{EXPERIMENTAL} Built from the paper's description, with no code to compare with."
        )
    for name in dict.fromkeys(record["guide"] for record in records if record["guide"]):
        lines.append(f"{GUIDED} {_guided(name, records[0]['flops'])}")
    return lines


def _guided(name: str, unpruned: float | None) -> str:
    """What guidance costs; no number in the results includes it."""
    uncounted = "first, unpruned. That is in none of the FLOPs, times and tokens here"
    if name != "itself":
        return f"Guided by {name}, which answers every question {uncounted}."
    alone = "" if unpruned is None else f" of {number(unpruned, 1e9)} GFLOPs"
    return (
        f"Guided by the model itself, which answers every question {uncounted}: so guided, the "
        f"method costs a whole prefill{alone} more and saves nothing. It shows what its ranking "
        "is worth."
    )


def _judged(differences: Sequence[Difference]) -> list[tuple[str, list[Difference]]]:
    """Differences grouped by the verdict of the test; verdicts that do not occur are left out."""
    kinds = (
        (BETTER, [d for d in differences if d.paired.clear and d.paired.difference > 0]),
        (WORSE, [d for d in differences if d.paired.clear and d.paired.difference < 0]),
        (UNCLEAR, [d for d in differences if not d.paired.clear]),
    )
    return [(verdict, chosen) for verdict, chosen in kinds if chosen]


def is_pore(difference: Difference) -> bool:
    """Whether the second of the two divides by a bias that was measured."""
    return difference.second.reweight not in (None, "rope")
