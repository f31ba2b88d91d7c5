"""Parts that the pages of evaluations share: tables and charts of records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pore._numbers import interval, number, p_value, percent, points, tokens
from pore._page import Dot, File, dots, html, items, joined, table
from pore._page.tables import Row
from pore._text import Html
from pore.evaluation import tables
from pore.evaluation.differences import Difference
from pore.evaluation.records import Record
from pore.evaluation.statistics import holm
from pore.plotting.labels import UNPRUNED, budget_label, label, marks

UNSTEADY = 0.2
"""A time is marked if its quartiles lie further apart than this share of its median."""

RESULTS = (
    File("results.json", "every number of this page, and the score of every question"),
    File("results.csv", "the table"),
)
"""What every evaluation writes beside its page."""


def results_table(
    records: Sequence[Record], *, mean: bool = False, taught: int | None = None
) -> Html:
    """The table of records, budget by budget.

    Args:
        records: The records.
        mean: Whether to show the tokens averaged over the layers too.
        taught: As in `pore.plotting.labels.marks`.
    """
    shown = [(by, name) for by in tables.HEADINGS for name in tables.columns(records, by)]
    boxes = any(record["iou"] is not None for record in records)
    known = known_costs(records)
    headings = ["method", "accuracy %", *(["IoU"] if boxes else []), *known]
    headings += ["mean tokens"] if mean else []
    above = [("", len(headings))]
    above += [(tables.HEADINGS[by], sum(one == by for one, _ in shown)) for by in tables.HEADINGS]

    def cells(record: Record) -> list[object]:
        right = percent(record["accuracy"]), interval(record["ci"])
        return [
            label(record["method"], record["reweight"]) + marks(record, taught),
            html("<b>{}</b> <small>{}</small>", *right),
            *([number(record["iou"])] if boxes else []),
            *(cost(record) for cost in known.values()),
            *([number(record["mean_tokens"])] if mean else []),
            *(html("{}<br><small>{}</small>", *tables.share(record, *one)) for one in shown),
        ]

    blocks = (
        (budget, [Row(cells(record), is_own(record)) for record in block])
        for budget, block in tables.groups(records)
    )
    named = [third(name) if by == "third" else name for by, name in shown]
    spans = [one for one in above if one[1]]
    return table("Results by method and budget", [*headings, *named], blocks, above=spans)


def known_costs(records: Sequence[Record]) -> dict[str, Callable[[Record], object]]:
    """The columns of costs that some record knows, and what stands in them."""
    found: dict[str, Callable[[Record], object]] = dict(tables.costs_of(records))
    if found.pop("ms", None):
        found["prefill ms"] = _time
    return found


def is_own(record: Record) -> bool:
    """Whether a record is of a method that divides by a bias that was measured."""
    return record["reweight"] not in (None, "rope")


def third(name: str) -> Html:
    """The name of a third of the image, with a picture of where that is."""
    if name not in ("top", "middle", "bottom"):
        return html("{}", name)
    return html("<span class='third {}' aria-hidden='true'></span>{}", name, name)


def _time(record: Record) -> Html:
    """The median of a time and its quartiles, marked where they lie far apart."""
    quartiles = record["prefill_ms_quartiles"]
    shown = number(record["prefill_ms"])
    if quartiles is None:
        return html("{}", shown)
    low, high = map(number, quartiles)
    mark = " ≈" if unsteady(record) else ""
    return html("{}{}<br><small>{}–{}</small>", shown, mark, low, high)


def unsteady(record: Record) -> bool:
    """Whether the measurements of a time disagree too much to say anything."""
    quartiles = record["prefill_ms_quartiles"]
    if quartiles is None:
        return False
    return bool(quartiles[1] - quartiles[0] > UNSTEADY * record["prefill_ms"])


def about_times(records: Sequence[Record]) -> str:
    """How to read the times, in sentences; nothing where there are none."""
    if all(record["prefill_ms"] is None for record in records):
        return ""
    said = (
        "Prefill is the median wall time per question and, below it, the quartiles: from pixels to "
        "the first token, in batches of 8, five times, with the methods taking turns."
    )
    if marked := sum(map(unsteady, records)):
        said += (
            f" {marked} of {len(records)} times are marked ≈: their quartiles lie more than "
            f"{UNSTEADY:.0%} of the median apart, because the machine had other work to do. "
            "Compare nothing by them; the command pore bench measures times with care."
        )
    return said


def accuracy_dots(
    records: Sequence[Record], shown: Sequence[Record], taught: int | None = None
) -> Html:
    """A chart of accuracies with their intervals, and a line for the unpruned model.

    Args:
        records: All records, that of the unpruned model first.
        shown: Those to draw.
        taught: As in `pore.plotting.labels.marks`.
    """
    unpruned = records[0]
    groups = [
        (budget, [_dot(record, taught) for record in block])
        for budget, block in tables.groups(shown)
    ]
    caption = (
        f"Accuracy on {unpruned['n']} questions, in percent, with 95 % intervals. The dashed line "
        f"is the unpruned model: {percent(unpruned['accuracy'])} %."
    )
    return dots(groups, caption, line=100 * unpruned["accuracy"])


def _dot(record: Record, taught: int | None) -> Dot:
    low, high = (100 * end for end in record["ci"])
    cost = [f"{tokens(record['tokens_after'])} visual tokens reach the last layer"]
    if record["flops"] is not None:
        cost.append(f"{number(record['flops'], 1e9)} GFLOPs")
    return Dot(
        label(record["method"], record["reweight"]) + marks(record, taught),
        100 * record["accuracy"],
        f"{percent(record['accuracy'])} {interval(record['ci'])}",
        (low, high),
        ", ".join(cost),
        is_own(record),
    )


def differences_table(
    differences: Sequence[Difference], *, thirds: bool = False, taught: int | None = None
) -> Html:
    """The table of paired differences.

    Args:
        differences: The differences.
        thirds: Whether some are about the questions of a third of the image alone.
        taught: As in `pore.plotting.labels.marks`.
    """
    which = ("questions",) if thirds else ()
    headings = ("budget", "method", *which, "difference", "95 % interval", "won", "lost")
    corrected = iter(holm([d.paired.p for d in differences if d.third is None]))
    rows = []
    for d in differences:
        paired = d.paired
        named = html("{}", "all") if d.third is None else third(d.third)
        cells = (
            budget_label(d.second.keep),
            d.second.label + marks(d.record(), taught),
            *([named] if thirds else ()),
            html("<b>{}</b>" if paired.clear else "{}", points(paired.difference)),
            d.interval,
            str(paired.gained),
            str(paired.lost),
            p_value(paired.p),
            p_value(next(corrected)) if d.third is None else "",
        )
        own = d.third is None if thirds else d.second.reweight not in (None, "rope")
        rows.append(Row(cells, own))
    heads = (*headings, "p", "p (Holm)")
    return table("Differences, question by question", heads, [("", rows)], kind="differences")


def differences_dots(differences: Sequence[Difference], taught: int | None = None) -> Html:
    """A chart of paired differences over all questions, budget by budget."""
    groups: dict[str, list[Dot]] = {}
    for d in differences:
        if d.third is None:
            low, high = (100 * end for end in d.paired.ci)
            clear = d.paired.clear
            dot = Dot(
                d.second.method + marks(d.record(), taught),
                100 * d.paired.difference,
                f"{points(d.paired.difference)} {d.interval}",
                (low, high),
                f"{d.paired.gained} won, {d.paired.lost} lost, p = {p_value(d.paired.p)}",
                own=clear,
                hollow=not clear,
            )
            groups.setdefault(budget_label(d.second.keep), []).append(dot)
    caption = (
        "Accuracy with PoRe minus accuracy without, in points on the same questions, with 95 % "
        "intervals. Filled dots: p < 0.05."
    )
    return dots(list(groups.items()), caption, line=0.0)


def beside(folder: Path, files: Mapping[str, str]) -> list[File]:
    """The files of a page that are in its folder.

    Args:
        folder: The folder.
        files: What each of them holds, by name.
    """
    return [*RESULTS, *(File(n, said) for n, said in files.items() if (folder / n).exists())]


def unpruned_of(records: Sequence[Record]) -> Record:
    """The record of the unpruned model."""
    return next(record for record in records if record["method"] == UNPRUNED)


def left_out(reasons: Sequence[str], none: str = "Nothing.") -> Html:
    """What was left out and why, or that nothing was."""
    return html("<ul>{}</ul>", items(reasons)) if reasons else html("<p>{}</p>", none)


def listed(lines: Sequence[str]) -> Html:
    """Sentences as small paragraphs below a table."""
    return joined(html("<p class='note'>{}</p>", line) for line in lines if line)
