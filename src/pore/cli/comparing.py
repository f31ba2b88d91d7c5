"""`pore evaluate --corrections`: every correction on every host."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pore._numbers import interval, number, p_value, percent, points
from pore._progress import progress
from pore._screen import cell
from pore.cli.about import command_line
from pore.cli.printing import plain_table, say, stdout

if TYPE_CHECKING:
    from pore.data.samples import Sample
    from pore.evaluation.comparing import Comparison
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
    stdout().print(_table(result))
    stdout().print(_thirds(result))
    records = [one.record() for one in result.compared]
    say(*footnotes(records, result.taught))
    say(*(f"Left out: {one.method}: {one.reason}" for one in result.left_out))
    say(
        f"\n{result.questions} questions were asked under every setting. Wrote {written}, "
        f"results.json, differences.json and corrections.png in {time.monotonic() - began:.0f} s."
    )


def _table(result: Comparison) -> Any:
    """A row for every setting: how many are right, and how that differs from the host alone."""
    from pore.evaluation.candidates import NONE
    from pore.evaluation.statistics import holm
    from pore.plotting.labels import marks

    whole = [one.differences[0].paired.p for one in result.compared if one.differences]
    corrected = iter(holm(whole))
    made = plain_table(
        *("kept", "host", "correction", "right, %", "difference, points", "p", "p (Holm)"),
        *("GFLOPs", "ms"),
    )
    for one in result.compared:
        record = one.record()
        cells = ["", "", ""]
        if one.differences:
            first = one.differences[0]
            cells = [f"{points(first.paired.difference)} {first.interval}", p_value(first.paired.p)]
            cells.append(p_value(next(corrected)))
        correction = one.setting.correction
        made.add_row(
            cell("all" if one.setting.keep is None else str(one.setting.keep)),
            cell(record["method"] + marks(record, result.taught)),
            cell("" if correction == NONE else correction),
            cell(f"{percent(record['accuracy'])} {interval(record['ci'])}"),
            *map(cell, cells),
            cell(number(record["flops"], 1e9)),
            cell(number(record["prefill_ms"])),
        )
    return made


def _thirds(result: Comparison) -> Any:
    """How every correction differs from the host alone, by third of the image asked about."""
    thirds = dict.fromkeys(d.third for one in result.compared for d in one.differences)
    names = [str(third) for third in thirds if third is not None]
    made = plain_table("kept", "host", "correction", *(f"{name}, points" for name in names))
    for one in result.compared:
        by_third = {
            d.third: f"{points(d.paired.difference)} {d.interval}" for d in one.differences[1:]
        }
        if by_third:
            made.add_row(
                cell(str(one.setting.keep)),
                cell(one.outcome.method),
                cell(one.setting.correction),
                *(cell(by_third.get(name, "-")) for name in names),
            )
    return made
