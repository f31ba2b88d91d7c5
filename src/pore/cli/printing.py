"""What commands print: text and tables, with control characters escaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pore._text import Screen, cell

if TYPE_CHECKING:
    from rich.table import Table

    from pore.evaluation.records import Record

# What the widest table needs where the width of the output is unknown, as in a pipe.
_WIDTH = 118


def stdout() -> Screen:
    """The standard output; in a pipe as wide as the widest table."""
    console = Screen()
    return console if console.is_terminal else Screen(width=_WIDTH)


def say(*lines: str, style: str = "") -> None:
    """Print text unwrapped: a terminal wraps it by itself, and a file needs no wrapping."""
    console = stdout()
    for line in lines:
        console.print(line, style=style, soft_wrap=True)


def complain(what: str, style: str, error: BaseException) -> None:
    """Print a label and an error to stderr."""
    console = Screen(stderr=True)
    console.print(cell(what, style), str(error), soft_wrap=True)


def plain_table(*headings: str) -> Table:
    """An empty table whose columns wrap long text."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def headline(records: Sequence[Record]) -> str:
    """What the numbers of an evaluation are, such as "Right answers" or "VQA accuracy"."""
    from pore.evaluation.metrics import EXACT, METRICS

    name = records[0]["metric"]
    if name == EXACT.name:
        return "Right answers"
    title = METRICS[name].title
    return f"{title[0].upper()}{title[1:]}"


def print_results(records: Sequence[Record]) -> None:
    """The tables of an evaluation: all questions, and a table for each way to group them."""
    from pore.evaluation.tables import HEADINGS, columns, table

    console, title = stdout(), f"{headline(records)} in % with 95 % interval"
    made = [table(records, title=title, parts=("cost", "accuracy"))]
    for by, how in HEADINGS.items():
        if columns(records, by):
            made.append(table(records, title=f"{title}, {how}", parts=(by,)))
    widths = [Screen(width=1000).measure(one).maximum for one in made]
    if not console.is_terminal:
        console = Screen(width=max(*widths, _WIDTH))
    for one in made:
        console.print(one)
    say(
        "tokens: visual tokens at the last layer; GFLOPs: prefill with tower, multiply-add = 2; "
        "ms: median time of the prefill per question\n",
        style="dim",
    )
