"""`pore generate`: one question about one image or video."""

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
    method_of,
    takes,
)
from pore.cli.printing import say
from pore.errors import InputError

if TYPE_CHECKING:
    from pore.data.prompts import Resize
    from pore.data.samples import Sample
    from pore.engine.pruner import Pruner
    from pore.engine.report import Report


@dataclass(frozen=True)
class Options(Loading):
    """The options of `pore generate`."""

    file: Annotated[
        Path,
        typer.Argument(
            help="An image; or a video: a file, an animated picture, or a folder of frames."
        ),
    ]
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
    frames: Annotated[
        int, typer.Option(min=1, help="Frames taken of a video, at equal distances.")
    ] = 8
    draw: Annotated[
        Path | None,
        typer.Option(
            help="PNG file to draw the image and its kept tokens in, or the frames of a video side "
            "by side; a GIF or WebP file shows them one after the other."
        ),
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print answer and report as JSON.")] = (
        False
    )


@takes(Options)
def generate(options: Options) -> None:
    """Answer a question about an image or a video, and say what was kept of it.

    Videos are decoded by PyAV (pip install 'pore-vlm[video]'); an animated GIF, PNG or WebP and a
    folder of frames need nothing.

    Examples:

        pore generate scene.png "What color is the circle?" --keep 25% --draw kept.png

        pore generate cat.jpg "What is this?" -m llava-hf/llava-1.5-7b-hf --reweight llava.json

        pore generate clip.mp4 "What moves?" -m llava-hf/LLaVA-NeXT-Video-7B-hf --method VidCom2 \
            --frames 16 --keep 25% --draw kept.gif
    """
    from pore.data.loading import load_model
    from pore.data.prompts import check_takes_videos

    sample = _sample(options)
    (keep,) = budgets([options.keep] if options.keep else None, options.settings)
    model, processor = load_model(options.model, **options.how)
    if sample.of_video:
        check_takes_videos(processor)
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
        resize = None if pruner is None else pruner.resizing(model, processor)
        _draw_kept(model, processor, sample, report, answer, options.draw, resize)
        if not options.as_json:
            say(f"Wrote {options.draw}.")


def _sample(options: Options) -> Sample:
    """The question, with the image read, or the frames taken from the video."""
    from pore._videos import is_video, read_video
    from pore.data.samples import Sample
    from pore.plotting.frames import ANIMATIONS

    name, moving = options.file.name, is_video(options.file)
    if options.draw is not None and options.draw.suffix.lower() in ANIMATIONS and not moving:
        raise InputError(f"{options.draw} is for a video, and {name} is an image; name a PNG file.")
    seen = read_video(options.file, options.frames) if moving else options.file
    sample = Sample(name, seen, options.question)
    sample.load()  # says what is wrong before the model is loaded
    return sample


def _pruner(
    options: Options, model: Any, processor: Any, sample: Sample, keep: int | float
) -> Pruner:
    from pore.evaluation.reweighting import biases_named, reweighted

    biases = biases_named(options.reweight, options.allow or (), model, processor, [sample])
    pruner = method_of(options, model, keep)
    return pruner if biases is None else reweighted(pruner, biases)


def _answer(
    model: Any, processor: Any, sample: Sample, pruner: Pruner | None, longest: int
) -> tuple[str, Report | None]:
    """The answer, and the report of the pruner, if there is one."""
    import torch

    from pore.data.prompts import build_inputs

    resize = None if pruner is None else pruner.resizing(model, processor)
    inputs = build_inputs(processor, [sample], model.device, model.dtype, resize)
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
    model: Any,
    processor: Any,
    sample: Sample,
    report: Report | None,
    answer: str,
    path: Path,
    resize: Resize | None,
) -> None:
    from pore import plotting
    from pore.data.coverage import coverage_of

    title = f"{sample.question} “{answer}”"
    kept = None
    if report is not None:
        kept = [image.kept for image in report.samples[0].images]
    if sample.of_video:
        _draw_frames(model, processor, sample, kept, title, path)
        return
    picture, settings = sample.load_image(), {}
    if resize is not None:  # what the model was shown
        settings = dict(resize.settings)
        picture = picture if resize.picture is None else resize.picture(picture)
    covered = coverage_of(model, processor, picture, **settings)
    plotting.save(plotting.layout(picture, covered, kept, title=title), path)


def _draw_frames(
    model: Any,
    processor: Any,
    sample: Sample,
    kept: list[tuple[int, ...]] | None,
    title: str,
    path: Path,
) -> None:
    from pore import plotting
    from pore.data.seen_frames import seen_frames

    frames = plotting.frames_kept(seen_frames(model, processor, sample), kept)
    if path.suffix.lower() in plotting.ANIMATIONS:
        plotting.animated(frames, path)
    else:
        plotting.save(plotting.strip(frames, title=title), path)
