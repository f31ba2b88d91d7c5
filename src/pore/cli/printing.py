"""What commands print: text, tables and a progress bar, none of which a terminal obeys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pore._text import Screen, cell, visible

if TYPE_CHECKING:
    from rich.table import Table

# What the widest table needs where the width of the output is unknown, as in a pipe.
_WIDTH = 118


def stdout() -> Screen:
    """The standard output; in a pipe as wide as the widest table."""
    console = Screen()
    return console if console.is_terminal else Screen(width=_WIDTH)


def say(*lines: str, style: str = "") -> None:
    """Print text as it is, not broken into lines: a terminal does that, and files need none."""
    console = stdout()
    for line in lines:
        console.print(line, style=style, soft_wrap=True)


def complain(what: str, style: str, error: BaseException) -> None:
    """Print an error to stderr, after a word for it."""
    console = Screen(stderr=True)
    console.print(cell(what, style), str(error), soft_wrap=True)


def plain_table(*headings: str) -> Table:
    """An empty table whose columns break what is too long."""
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
        "tokens: visual ones at the last layer; GFLOPs: of the prefill with tower, multiply-add = "
        "2; ms: prefill per question, median\n",
        style="dim",
    )


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """One bar for a whole command, on stderr; gives a function of what is done and what share."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=Screen(stderr=True, soft_wrap=True),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=1.0)

        def tell(what: str, share: float) -> None:
            bar.update(task, description=visible(what), completed=share)

        yield tell
