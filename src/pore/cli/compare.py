"""`pore compare`: which differences between two files of results are real."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pore._numbers import interval, p_value, percent, points, signed
from pore._screen import cell
from pore.cli.options import LARGEST_SEED, AsJson, takes
from pore.cli.printing import plain_table, say, stdout

if TYPE_CHECKING:
    from rich.table import Table

    from pore.evaluation.sweep_scores import Change
    from pore.evaluation.verdicts import Verdict


_Read = TypeVar("_Read")
_Found = tuple[Any, tuple[Mapping[str, Any], Mapping[str, Any]], Callable[[Any], Any]]


@dataclass(frozen=True)
class Options:
    """The options of `pore compare`."""

    first_file: Annotated[
        Path,
        typer.Argument(help="A results.json of `pore evaluate`, or a scores.json of its sweeps."),
    ]
    second_file: Annotated[
        Path, typer.Argument(help="The file to compare with it; the same one is fine.")
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
    p from the exact McNemar test where answers are right or wrong, else from a permutation test. Of
    sweeps every benchmark is compared, and the mean over all of them. p is then corrected for the
    number of comparisons by Holm's method: if every difference whose corrected p is below 0.05 is
    taken for real, the chance that even one of them is not is below 5 %.

    Examples:

        pore compare runs/before/results.json runs/after/results.json

        pore compare runs/all/results.json runs/all/results.json --first FastV

        pore compare a/results.json b/results.json --first FastV --second "FastV + PoRe" --json

        pore compare runs/sweep/scores.json runs/sweep/scores.json --first FastV --second HoloV
    """
    from pore._saved.parsing import says
    from pore.evaluation.files import SWEEP_SCORES

    found = _sweeps if says(options.first_file, SWEEP_SCORES) else _results
    verdicts, (first, second), table = found(options)
    if options.as_json:
        document = {
            "first": dict(first),
            "second": dict(second),
            "correction": f"Holm, {len(verdicts)} comparisons",
            "seed": options.seed,
            "comparisons": [verdict.record() for verdict in verdicts],
        }
        typer.echo(json.dumps(document, indent=2))
        return
    stdout().print(table(verdicts))
    real = sum(verdict.real for verdict in verdicts)
    say(
        f"{real} of {len(verdicts)} differences are real: p, corrected by Holm's method for "
        f"{len(verdicts)} comparisons, is below 0.05. The others may be chance, though an interval "
        "is for one comparison alone."
    )
    for line in _changed(first, second):
        say(line)


def _results(options: Options) -> _Found:
    """The verdicts on two files of results, their circumstances, and how verdicts are shown."""
    from pore.evaluation.files import read_results
    from pore.evaluation.verdicts import judge

    first, second = _both(options, read_results)
    verdicts = judge(first, second, names=(options.first, options.second), seed=options.seed)
    return verdicts, (first.circumstances, second.circumstances), _table


def _sweeps(options: Options) -> _Found:
    """The same of two sweeps."""
    from pore.evaluation.sweep_scores import judge_sweeps, read_scores

    (first, mine), (second, others) = _both(options, read_scores)
    names = (options.first, options.second)
    return judge_sweeps(mine, others, names=names, seed=options.seed), (first, second), _changes


def _both(options: Options, read: Callable[[Path], _Read]) -> tuple[_Read, _Read]:
    """What both files hold; one that is given twice is read once."""
    first = read(options.first_file)
    same = options.first_file.resolve() == options.second_file.resolve()
    return first, first if same else read(options.second_file)


def _changes(verdicts: Sequence[Change]) -> Table:
    from pore.plotting.labels import budget_label

    made = plain_table(
        *("kept", "first and second", "benchmark", "difference"),
        *("won,\nlost", "p, then\nby Holm", "real"),
    )
    for one in verdicts:
        paired, unit = one.paired, 0.01 if one.benchmark is None else 1.0
        ends = ", ".join(signed(end / unit) for end in paired.ci)
        made.add_row(
            cell(budget_label(one.second.keep).removeprefix("keep ")),
            cell(f"{one.first.name}\n{one.second.name}"),
            cell(one.benchmark or "mean, %\nof unpruned"),
            cell(f"{signed(paired.difference / unit)}\n[{ends}]"),
            f"{paired.gained}\n{paired.lost}",
            f"{p_value(paired.p)}\n{p_value(one.p_holm)}",
            cell("yes" if one.real else "no", "bold" if one.real else ""),
        )
    return made


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
