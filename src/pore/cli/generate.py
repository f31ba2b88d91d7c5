"""`pore generate`: one question about one image."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pore.cli.options import (
    Allow,
    Average,
    Keep,
    Layer,
    Loading,
    Method,
    Model,
    Normalize,
    Reweight,
    Set,
    budgets,
    takes,
)
from pore.cli.printing import say

if TYPE_CHECKING:
    from pore.data.samples import Sample
    from pore.engine.pruner import Pruner
    from pore.engine.report import Report


@dataclass(frozen=True)
class Options(Loading):
    """The options of `pore generate`."""

    image: Annotated[Path, typer.Argument(help="File of the image.")]
    question: Annotated[str, typer.Argument(help="What to ask about it.")]
    model: Model = "embedded"
    method: Method = "FastV"
    keep: Keep = None
    average: Average = False
    layer: Layer = None
    reweight: Reweight = None
    allow: Allow = None
    normalize: Normalize = None
    settings: Set = None
    unpruned: Annotated[bool, typer.Option("--unpruned", help="Prune nothing.")] = False
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64
    draw: Annotated[
        Path | None, typer.Option(help="PNG file to draw the image and its kept tokens in.")
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print answer and report as JSON.")] = (
        False
    )


@takes(Options)
def generate(options: Options) -> None:
    """Answer a question about an image, and say what was kept of it.

    Examples:

        pore generate scene.png "What color is the circle?" --keep 25% --draw kept.png

        pore generate cat.jpg "What is this?" -m llava-hf/llava-1.5-7b-hf --reweight llava.json
    """
    from pore.data.loading import load_model
    from pore.data.samples import Sample

    sample = Sample(options.image.name, options.image, options.question)
    sample.load_image()
    (keep,) = budgets([options.keep] if options.keep else None, options.settings)
    model, processor = load_model(options.model, **options.how)
    pruner = None if options.unpruned else _pruner(options, model, processor, sample, keep)
    answer, report = _answer(model, processor, sample, pruner, options.max_new_tokens)
    # The answer comes first, so that it is not lost if the drawing fails.
    if options.as_json:
        shown = {"answer": answer, "report": None if report is None else report.to_dict()}
        typer.echo(json.dumps(shown, indent=2))
    else:
        say(answer, style="bold")
        if report is not None:
            say(str(report), style="dim")
    if options.draw is not None:
        _draw_kept(model, processor, sample, report, answer, options.draw)
        if not options.as_json:
            say(f"Wrote {options.draw}.")


def _pruner(
    options: Options, model: Any, processor: Any, sample: Sample, keep: int | float
) -> Pruner:
    from pore.evaluation.reweighting import biases_named, reweighted
    from pore.methods.making import make

    biases = biases_named(options.reweight, options.allow or (), model, processor, [sample])
    pruner = make(
        options.method,
        model,
        keep,
        average=options.average,
        texts=options.settings or (),
        layer=options.layer,
        normalize=options.normalize,
    )
    return pruner if biases is None else reweighted(pruner, biases)


def _answer(
    model: Any, processor: Any, sample: Sample, pruner: Pruner | None, longest: int
) -> tuple[str, Report | None]:
    """The answer, and the report of the pruner, if there is one."""
    import torch

    from pore.data.prompts import build_inputs

    inputs = build_inputs(processor, [sample], model.device, model.dtype)
    report = None
    with torch.inference_mode():
        if pruner is None:
            tokens = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        else:
            with pruner(model) as run:
                tokens = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
            report = run.report
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True)[0].strip(), report


def _draw_kept(
    model: Any, processor: Any, sample: Sample, report: Report | None, answer: str, path: Path
) -> None:
    from pore import plotting
    from pore.data.coverage import coverage_of

    picture = sample.load_image()
    kept = None
    if report is not None:
        kept = [image.kept for image in report.samples[0].images]
    figure = plotting.layout(
        picture, coverage_of(model, processor, picture), kept, title=f"{sample.question} “{answer}”"
    )
    plotting.save(figure, path)
