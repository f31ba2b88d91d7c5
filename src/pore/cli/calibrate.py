"""`pore calibrate`: measure, fit and save P."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pore.cli.options import (
    Batch,
    Layer,
    Limit,
    Loading,
    Model,
    Normalize,
    Questions,
    Samples,
    Set,
    Split,
    budgets,
    form_of_bias,
    takes,
)
from pore.cli.plot import draw_biases
from pore.cli.printing import say


@dataclass(frozen=True)
class Options(Loading):
    """The options of `pore calibrate`."""

    out: Annotated[Path, typer.Option("--out", "-o", help="File for P.")] = Path("profile.json")
    model: Model = "embedded"
    samples: Samples = "embedded:calibration"
    questions: Questions = None
    split: Split = "train"
    limit: Limit = None
    method: Annotated[
        str,
        typer.Option(help="Method that P is for; `pore methods` shows which methods take a P."),
    ] = "FastV"
    keep: Annotated[
        str | None,
        typer.Option(
            help="The method's budget; it matters only if the layers that it reads depend on it. "
            "[default: 25%]"
        ),
    ] = None
    layer: Layer = None
    normalize: Normalize = None
    settings: Set = None
    kind: Annotated[
        str, typer.Option(help="exponential, exponential+offset, spline or empirical.")
    ] = "exponential"
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="File for the sums, to resume from. [default: OUT.calibration.json]"),
    ] = None
    max_bad: Annotated[
        float, typer.Option(help="Largest share of bad samples to skip; more stop the run.")
    ] = 0.01
    figures: Annotated[
        Path | None, typer.Option(help="Folder for figure1.png and figure2.png.")
    ] = None
    batch_size: Batch = 8


@takes(Options)
def calibrate(options: Options) -> None:
    """Measure the position bias of a model, fit P and save it.

    A method that ranks by attention at several layers gets one P for each, all in one file. Only
    the vision tower runs, and the decoder up to the last layer whose attention is read. If it is
    interrupted, the same command resumes where it stopped.

    Examples:

        pore calibrate --out profile.json --figures figures

        pore calibrate --method PyramidDrop --out pyramid.json

        pore calibrate -m llava-hf/llava-1.5-7b-hf -s photos --questions ask.txt -o llava.json
    """
    from pore.bias.stages import save_biases
    from pore.calibration.calibrating import calibrate as measure
    from pore.data.loading import load_model
    from pore.data.sources import load_samples
    from pore.methods.making import make

    form = form_of_bias(options.kind)
    (keep,) = budgets([options.keep] if options.keep else None, options.settings)
    model, processor = load_model(options.model, **options.how)
    out = options.out
    sums = options.checkpoint or out.with_name(f"{out.stem}.calibration.json")
    measured = measure(
        model,
        processor,
        list(
            load_samples(
                options.samples,
                questions=options.questions,
                limit=options.limit,
                split=options.split,
            )
        ),
        host=make(
            options.method,
            model,
            keep,
            texts=options.settings or (),
            layer=options.layer,
            normalize=options.normalize,
        ),
        batch_size=options.batch_size,
        checkpoint=sums,
        max_bad=options.max_bad,
        source=options.samples,
    )
    biases = measured.fit(form)
    save_biases(out, biases)
    say(*map(repr, biases))
    say(f"Wrote {out}, and the sums to {sums}.")
    if options.figures is not None:
        draw_biases(measured, biases, options.figures)
