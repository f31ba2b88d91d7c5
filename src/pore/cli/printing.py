"""What commands print: text and tables, with control characters escaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pore._text import Screen, cell

if TYPE_CHECKING:
    from rich.table import Table

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


def print_results(records: Sequence[dict[str, Any]]) -> None:
    """One table of an evaluation, or two under each other on a terminal too narrow for it."""
    from pore.evaluation.tables import table

    console = stdout()
    title = "Right answers in % with 95 % interval, by kind of question and third of the image"
    whole = table(records, title=title)
    width = Screen(width=1000).measure(whole).maximum
    if not console.is_terminal:
        console = Screen(width=max(width, _WIDTH))
    if width <= console.width:
        console.print(whole)
    else:
        parts = ("cost", "accuracy", "thirds")
        console.print(table(records, title="Right answers in %", parts=parts))
        console.print(table(records, title="Right answers in %, by kind", parts=("kinds",)))
    say(
        "tokens: visual tokens at the last layer; GFLOPs: prefill with tower, multiply-add = 2; "
        "ms: median time of the prefill per question\n",
        style="dim",
    )
