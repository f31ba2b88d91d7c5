"""Results as a table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from pore._numbers import interval, number, percent, tokens
from pore._screen import cell
from pore.evaluation.records import GROUPS, Record
from pore.plotting.labels import UNPRUNED, budget_label, label, marks

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

PARTS = ("cost", "accuracy", "kind", "third", "downsample")
"""The groups of columns of the table."""

HEADINGS = {
    "kind": "by kind of question",
    "third": "by third of the image",
    "downsample": "by what Downsample gets",
}
"""What is written above the columns of groups of questions."""


def groups(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Records by budget, in order of first appearance."""
    blocks: dict[str, list[Record]] = {}
    for record in records:
        unpruned = record["method"] == UNPRUNED
        name = "all visual tokens" if unpruned else budget_label(record["keep"])
        blocks.setdefault(name, []).append(record)
    return list(blocks.items())


def costs_of(records: Sequence[Record]) -> dict[str, Callable[[Record], str]]:
    """The columns of costs, and what stands in them; one that no record knows is left out."""
    found: dict[str, Callable[[Record], str]] = {"tokens": lambda one: tokens(one["tokens_after"])}
    if any(record["flops"] is not None for record in records):
        found["GFLOPs"] = lambda one: number(one["flops"], 1e9)
    if any(record["prefill_ms"] is not None for record in records):
        found["ms"] = lambda one: number(one["prefill_ms"])
    return found


def columns(records: Sequence[Record], by: str) -> list[str]:
    """The groups for which records hold an accuracy, in order of first appearance.

    Args:
        records: The records.
        by: What questions are grouped by, one of `records.GROUPS`.
    """
    groups = (group for record in records for group in record[f"accuracy_by_{by}"])
    return list(dict.fromkeys(groups))


def table(
    records: Sequence[Record],
    *,
    title: str | None = None,
    parts: Collection[str] = PARTS,
    taught: int | None = None,
    only: Collection[str] | None = None,
) -> Table:
    """Results like the paper's Table 1, with one block of methods for every budget.

    Args:
        records: What `Outcome.record` gives.
        title: Title of the table.
        parts: Which of `PARTS` to show: tokens, FLOPs and time; accuracy, and overlap if boxes are
            asked for; accuracy by kind of question, by third of the image, and on the questions
            that Downsample at the same budget gets wrong and right. Also "mean": tokens averaged
            over layers.
        taught: As in `pore.plotting.labels.marks`.
        only: The groups of questions to show, where there is no room for all of them.

    Returns:
        A table to print with rich.
    """
    from rich import box
    from rich.table import Table

    shown = [(by, group) for by in GROUPS if by in parts for group in columns(records, by)]
    shown = [one for one in shown if only is None or one[1] in only]
    boxes = "accuracy" in parts and any(record["iou"] is not None for record in records)
    above = None if title is None else cell(title)
    made = Table(title=above, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    made.add_column("method", no_wrap=True)
    costs = costs_of(records) if "cost" in parts else {}
    for name in costs:
        made.add_column(name, justify="right", no_wrap=True)
    if "mean" in parts:
        made.add_column("mean", justify="right", no_wrap=True)
    if "accuracy" in parts:
        made.add_column("accuracy", justify="right", no_wrap=True, style="bold")
    if boxes:
        made.add_column("IoU", justify="right", no_wrap=True)
    for _, name in shown:
        short = name if len(name) <= 13 else f"{name[:12]}."
        made.add_column(cell(short), justify="right", no_wrap=True)
    for budget, block in groups(records):
        made.add_section()
        made.add_row(cell(budget, "bold"))
        for record in block:
            name = f"  {label(record['method'], record['reweight'])}{marks(record, taught)}"
            cells: list[str | Text] = [cell(name)]
            cells += (shown(record) for shown in costs.values())
            if "mean" in parts:
                cells.append(number(record["mean_tokens"]))
            if "accuracy" in parts:
                cells.append(cell(f"{percent(record['accuracy'])} {interval(record['ci'])}"))
            if boxes:
                cells.append(number(record["iou"]))
            cells += (" ".join(share(record, *group)) for group in shown)
            made.add_row(*cells)
    return made


def share(record: Record, by: str, group: str) -> tuple[str, str]:
    """Accuracy of a group as a percentage, and its interval in whole percents.

    Args:
        record: The record.
        by: What questions are grouped by.
        group: The group.

    Returns:
        Such as "72.1" and "[63, 80]"; "-" and nothing for a group without questions. Older files
        have no intervals of groups.
    """
    shares, intervals = record[f"accuracy_by_{by}"], record[f"ci_by_{by}"]
    if group not in shares:
        return "-", ""
    if group not in intervals:
        return percent(shares[group]), ""
    return percent(shares[group]), interval(intervals[group], decimals=0)
