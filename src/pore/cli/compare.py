"""`pore compare`: which differences between two files of results are real."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pore._numbers import interval, p_value, percent, points
from pore._screen import cell
from pore.cli.options import LARGEST_SEED, AsJson, takes
from pore.cli.printing import plain_table, say, stdout

if TYPE_CHECKING:
    from rich.table import Table

    from pore.evaluation.verdicts import Verdict


@dataclass(frozen=True)
class Options:
    """The options of `pore compare`."""

    first_file: Annotated[Path, typer.Argument(help="A results.json of `pore evaluate`.")]
    second_file: Annotated[
        Path, typer.Argument(help="The results.json to compare with it; the same file is fine.")
    ]
    first: Annotated[
        str | None, typer.Option(help="Method of the first file. [default: all of them]")
    ] = None
    second: Annotated[
        str | None, typer.Option(help="Method of the second file. [default: all of them]")
    ] = None
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the bootstrap.")] = 0
    as_json: AsJson = False


@takes(Options)
def compare(options: Options) -> None:
    """Say which differences between two files of results are real.

    Both files must be about the same questions. At every budget, methods of the same name are
    compared with each other, question by question; with --first or --second, every method named so
    with every one of the other file. A difference has a 95 % interval from a paired bootstrap, and
    p from the exact McNemar test. p is then corrected for the number of comparisons by Holm's
    method: if every difference whose corrected p is below 0.05 is taken for real, the chance that
    even one of them is not is below 5 %.

    Examples:

        pore compare runs/before/results.json runs/after/results.json

        pore compare runs/all/results.json runs/all/results.json --first FastV

        pore compare a/results.json b/results.json --first FastV --second "FastV + PoRe" --json
    """
    from pore.evaluation.files import read_results
    from pore.evaluation.verdicts import judge

    first = read_results(options.first_file)
    second = first
    if options.first_file.resolve() != options.second_file.resolve():
        second = read_results(options.second_file)
    verdicts = judge(first, second, names=(options.first, options.second), seed=options.seed)
    if options.as_json:
        document = {
            "first": dict(first.circumstances),
            "second": dict(second.circumstances),
            "correction": f"Holm, {len(verdicts)} comparisons",
            "seed": options.seed,
            "comparisons": [verdict.record() for verdict in verdicts],
        }
        typer.echo(json.dumps(document, indent=2))
        return
    stdout().print(_table(verdicts))
    real = sum(verdict.real for verdict in verdicts)
    say(
        f"{real} of {len(verdicts)} differences are real: p, corrected by Holm's method for "
        f"{len(verdicts)} comparisons, is below 0.05. The others may be chance."
    )
    for line in _changed(first.circumstances, second.circumstances):
        say(line)


def _table(verdicts: Sequence[Verdict]) -> Table:
    from pore.evaluation.verdicts import name_of
    from pore.plotting.labels import budget_label

    made = plain_table(
        *("kept", "first and second", "right, %", "difference\nin points"),
        *("won,\nlost", "p, then\nby Holm", "real"),
    )
    for verdict in verdicts:
        one, other, paired = verdict.first, verdict.second, verdict.paired
        made.add_row(
            cell(budget_label(other["keep"]).removeprefix("keep ")),
            cell(f"{name_of(one)}\n{name_of(other)}"),
            cell("\n".join(f"{percent(r['accuracy'])} {interval(r['ci'])}" for r in (one, other))),
            cell(f"{points(paired.difference)}\n[{', '.join(map(points, paired.ci))}]"),
            f"{paired.gained}\n{paired.lost}",
            f"{p_value(paired.p)}\n{p_value(verdict.p_holm)}",
            cell("yes" if verdict.real else "no", "bold" if verdict.real else ""),
        )
    return made


def _changed(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The circumstances that differ, apart from the command and the date."""
    names = [name for name in first if name not in ("command", "date") and name in second]
    return [
        f"{name}: {first[name]} in the first file, {second[name]} in the second."
        for name in names
        if first[name] != second[name]
    ]
