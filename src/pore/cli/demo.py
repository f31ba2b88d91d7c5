"""`pore demo`: the whole job."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pore._progress import progress
from pore.cli.about import about
from pore.cli.checks import check_drawing, check_folder, check_samples
from pore.cli.options import (
    LARGEST_SEED,
    SCENES,
    Batch,
    GivenLayer,
    Keeps,
    Loading,
    MaxBad,
    Model,
    budget,
    takes,
)
from pore.cli.printing import note, print_results, say
from pore.cli.verbosity import CHOSEN

if TYPE_CHECKING:
    from pore.evaluation.records import Record


@dataclass(frozen=True)
class Options(Loading):
    """The options of `pore demo`."""

    model: Model = "embedded"
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path(
        "runs/demo"
    )
    keep: Keeps = field(default_factory=lambda: ["50%", "25%", "22.2%", "10%"])
    layer: GivenLayer = 2
    calibration: Annotated[
        str | None,
        typer.Option(help=f"Samples that P is measured on. {SCENES.format('calibration')}"),
    ] = None
    images: Annotated[int, typer.Option(min=1, help="Calibration samples, at most.")] = 700
    test: Annotated[
        str | None, typer.Option(help=f"Test samples, with answers. {SCENES.format('test')}")
    ] = None
    questions: Annotated[int, typer.Option(min=1, help="Questions asked, at most.")] = 525
    max_bad: MaxBad = 0.01
    batch_size: Batch = 32
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=LARGEST_SEED, help="Seed of Random and of the bootstrap of differences."
        ),
    ] = 0


def _check(options: Options) -> None:
    """Refuse what can be seen to be wrong before a model is loaded."""
    for keep in options.keep:
        budget(keep)
    check_folder(options.out, "--out")
    check_drawing("pore demo")
    check_samples(options.calibration, "--calibration")
    check_samples(options.test, "--test")


@takes(Options, check=_check, config=True)
def demo(options: Options) -> None:
    """Calibrate, prune, ask and compare, and write a report.

    Measures the position bias on the calibration samples and fits P. Then the model answers the
    test questions unpruned and with FastV, FastV + PoRe, FastV + RoPE prior, Random and Downsample.
    Prints a table of the first questions early and that of all at the end, and writes
    `results.json`, `results.csv`, `profile.json`, figures, examples and `report.html` into the
    folder. For a model of images of any size P is a power of the distance to the text; what such a
    model does not take is left out, and the report says why. An interrupted run is continued by the
    same command.

    Examples:

        pore demo

        pore demo --questions 2100 --out runs/long

        pore demo -m llava-hf/llava-1.5-7b-hf --calibration calib.jsonl --test test.jsonl

        pore demo -m Qwen/Qwen2.5-VL-3B-Instruct
    """
    from pore.data.loading import load_model
    from pore.data.sources import load_samples, scenes_for
    from pore.evaluation import demo as job
    from pore.evaluation.findings import facts, is_pore
    from pore.evaluation.results import DemoSettings

    keeps = tuple(map(budget, options.keep))
    settings = DemoSettings(
        layer=options.layer,
        keeps=keeps,
        batch_size=options.batch_size,
        seed=options.seed,
        example_keep=0.25 if 0.25 in keeps else keeps[0],
        max_bad=options.max_bad,
    )
    began = time.monotonic()
    with progress() as told:
        told("loading the model", 0.0)
        model, processor = load_model(options.model, **options.how)
        calibration = options.calibration or scenes_for(model, "calibration")
        test = options.test or scenes_for(model, "test")
        result = job.run(
            model,
            processor,
            calibration=list(load_samples(calibration, limit=options.images)),
            test=list(load_samples(test, limit=options.questions)),
            out=options.out,
            settings=settings,
            about=about(
                options.model,
                model,
                calibration=calibration,
                test=test,
                seed=options.seed,
                choice=_choice(options.layer),
            ),
            progress=told,
            shown=_first,
        )
    print_results(result.records)
    say(*facts(result))
    for difference in result.differences:
        if is_pore(difference):
            say(f"  {difference}")
    note(f"\nWrote {result.report} in {time.monotonic() - began:.0f} s.")


def _first(records: Sequence[Record]) -> None:
    """Show the table of the first questions."""
    if CHOSEN.quiet:
        return
    note(f"After the first {records[0]['n']} questions; the rest are being asked.\n")
    print_results(records)


def _choice(layer: int) -> str:
    if layer == 2:
        return "K = 2 is the layer of the paper's Table 1; it was not chosen by results."
    return f"K = {layer} was asked for on the command line; the paper's Table 1 has K = 2."
