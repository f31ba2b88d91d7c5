"""`pore generate`: one question about images or videos."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pore.cli.answering import (
    Answering,
    Files,
    MaxNewTokens,
    content_of,
    pruner_for,
    sampling,
    shown_in,
)
from pore.cli.checks import check_method, check_reweight
from pore.cli.drawing import check_draw, draw_kept, title_of
from pore.cli.guides import check_guide, guiding_for
from pore.cli.options import Guide, Loading, budgets, takes
from pore.cli.printing import note, say
from pore.errors import InputError, PoreError

if TYPE_CHECKING:
    from pore.data.samples import Sample
    from pore.engine.pruner import Pruner
    from pore.engine.report import Report


@dataclass(frozen=True, kw_only=True)
class Options(Loading, Answering):
    """The options of `pore generate`."""

    files: Files
    question: Annotated[
        str, typer.Argument(metavar="QUESTION", help="What to ask about them, in one argument.")
    ]
    max_new_tokens: MaxNewTokens = 64
    guide: Guide = None
    draw: Annotated[
        Path | None,
        typer.Option(
            help="PNG file to draw the images and their kept tokens in, or the frames of a video "
            "side by side; a GIF or WebP file shows them one after the other."
        ),
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print answer and report as JSON.")] = (
        False
    )


def _check(options: Options) -> None:
    """Refuse what can be seen to be wrong before a model is loaded."""
    budgets([options.keep] if options.keep else None, options.settings)
    if not options.unpruned:
        check_guide(options)
        check_method(options.method, options.settings)
        check_reweight(options.reweight)


@takes(Options, check=_check, config=True)
def generate(options: Options) -> None:
    """Answer a question about images or a video.

    Says also which visual tokens were kept of them.

    Videos are decoded by PyAV (pip install 'pore-vlm[video]'); an animated GIF, PNG or WebP and a
    folder of frames need nothing. `pore chat` asks several questions, one after the other.

    Examples:

        pore generate scene.png "What color is the circle?" --keep 25% --draw kept.png

        pore generate a.jpg b.jpg "Which is redder?" -m Qwen/Qwen2.5-VL-7B-Instruct

        pore generate cat.jpg "What is this?" -m llava-hf/llava-1.5-7b-hf --reweight llava.json

        pore generate clip.mp4 "What moves?" -m llava-hf/LLaVA-NeXT-Video-7B-hf --method VidCom2
    """
    from pore.data.loading import load_model
    from pore.data.prompts import check_takes_videos

    # What is wrong with the files is said before the model is loaded.
    shown = [shown_in(path, options.frames, options.question) for path in options.files]
    if options.draw is not None:
        check_draw(options.draw, shown)
    how = sampling(options)
    (keep,) = budgets([options.keep] if options.keep else None, options.settings)
    model, processor = load_model(options.model, **options.how)
    if any(sample.of_video for sample in shown):
        check_takes_videos(processor)
    guiding = None if options.unpruned else guiding_for(options, model, processor)
    pruner = pruner_for(options, model, processor, keep, shown, guiding)
    answer, report = _answer(model, processor, shown, pruner, how)
    # The answer comes first, so that it is not lost if the drawing fails.
    if options.as_json:
        said = {"answer": answer, "report": None if report is None else report.to_dict()}
        typer.echo(json.dumps(said, indent=2))
    else:
        say(answer, style="bold")
        if report is not None:
            note(str(report))
    if options.draw is None:
        return
    images = None if report is None else report.samples[0].images
    title = title_of(options.question, answer, pruner, images)
    try:
        draw_kept(options.draw, model, processor, shown, images, pruner, title)
    except (PoreError, OSError) as error:
        raise InputError(
            f"The question was answered, but {options.draw} (--draw) was not written: {error}"
        ) from error
    if not options.as_json:
        note(f"Wrote {options.draw}.")


def _answer(
    model: Any,
    processor: Any,
    shown: Sequence[Sample],
    pruner: Pruner | None,
    how: dict[str, Any],
) -> tuple[str, Report | None]:
    """The answer, and the report of the pruner, if there is one."""
    import torch

    from pore._videos import Video
    from pore.data.prompts import Prompt, prompt_inputs, render_messages
    from pore.evaluation.guided import with_guide

    turn = {"role": "user", "content": content_of(shown, shown[0].question)}
    loaded = [sample.load() for sample in shown]
    prompt = Prompt(
        ", ".join(sample.id for sample in shown),
        render_messages(processor, [turn]),
        [one for one in loaded if one is not None and not isinstance(one, Video)],
        [one for one in loaded if isinstance(one, Video)],
    )
    resize = None if pruner is None else pruner.resizing(model, processor)
    inputs = prompt_inputs(processor, [prompt], model.device, model.dtype, resize)
    report = None
    with torch.inference_mode():
        guided = with_guide(pruner, [prompt], inputs, how["max_new_tokens"])
        if guided is None:
            tokens = model.generate(**inputs, **how)
        else:
            with guided(model) as run:
                tokens = model.generate(**inputs, **how)
            report = run.report
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True)[0].strip(), report
