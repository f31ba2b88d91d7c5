"""What commands print: text and tables, with control characters escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pore._screen import Screen, cell
from pore._text import capitalised
from pore.cli.verbosity import CHOSEN

if TYPE_CHECKING:
    from rich.table import Table

    from pore.evaluation.records import Record

# Wider than any table: in a pipe or a file nothing is wrapped or cut.
_UNBOUNDED = 10_000

# How wide the names of methods are in a table of groups of questions, and a group.
_NAMES, _GROUP = 22, 16


QUOTES = "\"'"


def stdout() -> Screen:
    """The standard output; where it is no terminal, of unbounded width."""
    console = Screen()
    return console if console.is_terminal else Screen(width=_UNBOUNDED)


def say(*lines: str, style: str = "") -> None:
    """Print text unwrapped: a terminal wraps it by itself, and a file needs no wrapping."""
    console = stdout()
    for line in lines:
        console.print(line, style=style, soft_wrap=True)


def note(*lines: str, style: str = "dim") -> None:
    """Print remarks beside the answer, such as which files were written; `-q` leaves them out."""
    if not CHOSEN.quiet:
        say(*lines, style=style)


def warn(message: str) -> None:
    """Print a warning to stderr; `-q` leaves it out."""
    if not CHOSEN.quiet:
        complain("Warning:", "yellow", message)


def complain(what: str, style: str, message: str) -> None:
    """Print a label and a message to stderr."""
    console = Screen(stderr=True)
    console.print(cell(what, style), in_options(message, CHOSEN.options), soft_wrap=True)


def in_options(message: str, options: Mapping[str, str]) -> str:
    """A message about a call in Python, said of a command: `keep=17` becomes `--keep 17`.

    Args:
        message: Such as 'keep=17 asks for more visual tokens than there are (16).'
        options: The options of the command, by the names that Python has for them.

    Returns:
        The message; what is in parentheses, such as FastV(keep=17), or in quotes stays as it is.
    """

    def option(found: re.Match[str]) -> str:
        before, value = message[: found.start()], found["value"]
        if before.count("(") > before.count(")"):
            return found[0]
        return f"{options[found['name']]} {value.strip(QUOTES)}"

    # A name alone is a name only where no word looks like it, such as max_bad.
    names = "|".join(sorted(options, key=len, reverse=True))
    alone = "|".join(name for name in options if "_" in name) or "(?!)"
    value = r"""(?P<value>"[^"]*"|'[^']*'|[^\s,;]*[^\s,;.])"""
    pattern = rf"(?<![\w.='\"-])(?:(?P<name>{names})={value}|(?P<alone>{alone})(?![\w=]))"
    if not options:
        return message
    return re.sub(
        pattern, lambda found: options[found["alone"]] if found["alone"] else option(found), message
    )


def plain_table(*headings: str) -> Table:
    """An empty table whose columns wrap long text."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def headline(records: Sequence[Record]) -> str:
    """What the numbers of an evaluation are, such as "Right answers" or "VQA accuracy"."""
    from pore.evaluation.metrics import EXACT, METRICS

    name = records[0]["metric"]
    if name == EXACT.name:
        return "Right answers"
    return capitalised(METRICS[name].title)


def print_results(records: Sequence[Record]) -> None:
    """The tables of an evaluation: all questions, and a table for each way to group them."""
    from pore.evaluation.tables import HEADINGS, columns, table

    console, title = stdout(), f"{headline(records)} in % with 95 % interval"
    say(title, style="italic")
    console.print(table(records, parts=("cost", "accuracy")))
    room = max((console.width - _NAMES) // _GROUP, 1)
    for by, how in HEADINGS.items():
        if named := columns(records, by):
            say(f"{title}, {how}", style="italic")
        for first in range(0, len(named), room):
            console.print(table(records, parts=(by,), only=named[first : first + room]))
    say(
        "tokens: visual tokens at the last layer; GFLOPs: prefill with tower, multiply-add = 2; "
        "ms: median time of the prefill per question\n",
        style="dim",
    )
