"""`pore evaluate --corrections`: every correction on every host."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pore._numbers import number, p_value, percent, points
from pore._progress import progress
from pore._screen import cell
from pore.cli.about import command_line
from pore.cli.printing import plain_table, say, stdout

if TYPE_CHECKING:
    from pore.data.samples import Sample
    from pore.evaluation.comparing import Compared, Comparison
    from pore.evaluation.differences import Difference
    from pore.evaluation.results import SurveySettings


def ask_corrections(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    settings: SurveySettings,
    *,
    name: str,
    source: str,
    calibration: str,
    images: int,
    guide: tuple[Any, Any] | None,
    out: Path,
) -> None:
    """Evaluate every correction on every host, and print the results.

    Args:
        model: The model.
        processor: Its processor.
        samples: The questions.
        settings: Budgets, batches and seed.
        name: What the user called the model.
        source: Where the questions come from.
        calibration: What corrections are calibrated on, as `load_samples` takes it.
        images: How many of that, at most.
        guide: The model that guides SGL and its processor; None for the model itself.
        out: Folder for the results.
    """
    from pore.cli.about import about
    from pore.data.sources import load_samples
    from pore.evaluation import comparing
    from pore.evaluation.corrections_page import write_corrections
    from pore.evaluation.findings import footnotes

    began = time.monotonic()
    with progress() as told:
        result = comparing.run(
            model,
            processor,
            calibration=list(load_samples(calibration, limit=images)),
            test=samples,
            out=out,
            settings=settings,
            source=calibration,
            command=command_line(),
            guide=guide,
            progress=told,
        )
    told_of = about(name, model, calibration=calibration, test=source, seed=settings.seed)
    written = write_corrections(result, told_of, out)
    _print_hosts(result)
    _print_thirds(result)
    records = [one.record() for one in result.compared]
    say(*footnotes(records, result.taught))
    say(*(f"Left out: {one.method}: {one.reason}" for one in result.left_out))
    say(
        f"\n{result.questions} questions were asked under every setting. Wrote {written}, "
        f"results.json, differences.json and corrections.png in {time.monotonic() - began:.0f} s."
    )


def _print_hosts(result: Comparison) -> None:
    """A table for every host at every budget, each fit for 80 columns."""
    from pore.evaluation.candidates import NONE
    from pore.evaluation.statistics import holm

    whole = [one.differences[0].paired.p for one in result.compared if one.differences]
    corrected = iter(holm(whole))
    for name, compared in _by_host(result, result.compared):
        made = plain_table("correction", "right, %", "difference, points", "p (Holm)", "GFLOPs")
        for one in compared:
            record, difference = one.record(), [""] * 2
            if one.differences:
                first = one.differences[0]
                difference = [f"{points(first.paired.difference)} {first.interval}"]
                difference.append(p_value(next(corrected)))
            correction = one.setting.correction
            made.add_row(
                cell("none" if correction == NONE else correction),
                cell(percent(record["accuracy"])),
                *map(cell, difference),
                cell(number(record["flops"], 1e9)),
            )
        say(name, style="bold")
        stdout().print(made)


def _print_thirds(result: Comparison) -> None:
    """How every correction differs from the host alone, by third of the image asked about."""
    thirds = dict.fromkeys(d.third for one in result.compared for d in one.differences)
    names = [third for third in thirds if third is not None]
    for name, compared in _by_host(result, result.compared if names else ()):
        made = plain_table("correction", *(f"{third}, points" for third in names))
        for one in compared:
            by_third = {d.third: d for d in one.differences[1:]}
            if by_third:
                shown = [_short(by_third.get(third)) for third in names]
                made.add_row(cell(one.setting.correction), *map(cell, shown))
        if made.row_count:
            say(f"{name}, by third of the image", style="bold")
            stdout().print(made)


def _by_host(
    result: Comparison, compared: Sequence[Compared]
) -> Iterator[tuple[str, list[Compared]]]:
    """The settings of one host at one budget, under the name of both."""
    from pore.plotting.labels import budget_label, marks

    def where(one: Compared) -> tuple[int | float | None, str]:
        return one.setting.keep, one.outcome.method

    for (keep, method), group in groupby(compared, where):
        own = list(group)
        host = method + marks(own[0].record(), result.taught)
        yield f"{host}, {'all visual tokens' if keep is None else budget_label(keep)}", own


def _short(difference: Difference | None) -> str:
    """A difference with an interval in whole points, as a third has fewer questions."""
    if difference is None:
        return "-"
    low, high = (points(round(end, 2)).removesuffix(".0") for end in difference.paired.ci)
    return f"{points(difference.paired.difference)} [{low}, {high}]"
