"""What `pore generate` and `pore chat` share: what is shown, and how answers are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pore.cli.options import LARGEST_SEED, Pruning, method_of
from pore.errors import InputError

if TYPE_CHECKING:
    from pore.data.samples import Sample
    from pore.engine.pruner import Pruner
    from pore.evaluation.guided import Guiding

Files = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE",
        help="One or more images; or videos: files, animated pictures, or folders of frames.",
    ),
]
Unpruned = Annotated[bool, typer.Option("--unpruned", help="Prune nothing.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
Frames = Annotated[int, typer.Option(min=1, help="Frames taken of a video, at equal distances.")]
Temperature = Annotated[
    float,
    typer.Option(
        min=0.0,
        help="Above 0, draw every token by chance: less likely ones more often the higher it is. "
        "0 takes the likeliest token.",
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        help="With a temperature, draw only from the likeliest tokens that together have this "
        "probability."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of what is drawn.")]


@dataclass(frozen=True, kw_only=True)
class Answering(Pruning):
    """Options of every command that answers questions as it is told to."""

    unpruned: Unpruned = False
    max_new_tokens: MaxNewTokens
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: Seed = 0
    frames: Frames = 8


def sampling(options: Answering) -> dict[str, Any]:
    """How an answer is chosen, as keywords of `generate`; seeds what is drawn.

    Args:
        options: Those of the command.

    Raises:
        InputError: They contradict each other, or are no probability.
    """
    if not 0 < options.top_p <= 1:
        raise InputError(f"--top-p is a probability above 0 and up to 1, not {options.top_p}.")
    longest = {"max_new_tokens": options.max_new_tokens}
    if options.temperature == 0:
        if options.top_p != 1:
            raise InputError("--top-p is for drawing by chance: give a --temperature above 0 too.")
        return {**longest, "do_sample": False}
    import torch

    torch.manual_seed(options.seed)
    drawn = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
    return {**longest, **drawn, "top_k": 0}  # which is 50 where it is not given


def shown_in(path: Path, frames: int, question: str = "") -> Sample:
    """An image or a video as a sample, read.

    Args:
        path: The file, or the folder of frames.
        frames: How many frames to take of a video.
        question: What is asked about it.

    Raises:
        InputError: It cannot be read.
    """
    from pore._videos import is_video, read_video
    from pore.data.samples import Sample

    if is_video(path):
        return Sample(path.name, read_video(path, frames), question)
    sample = Sample(path.name, path, question)
    return Sample(path.name, sample.load_image(), question)


def content_of(shown: Sequence[Sample], question: str) -> list[Mapping[str, Any]]:
    """The parts of a turn in a conversation, as chat templates take them."""
    parts = [{"type": "video" if sample.of_video else "image"} for sample in shown]
    return [*parts, {"type": "text", "text": question}]


def pruner_for(
    options: Answering,
    model: Any,
    processor: Any,
    keep: int | float,
    shown: Sequence[Sample],
    guiding: Guiding | None = None,
) -> Pruner | None:
    """The method that the options name, with its correction; None with --unpruned.

    Args:
        options: Those of the command.
        model: The model.
        processor: Its processor.
        keep: The budget.
        shown: What is asked about.
        guiding: What guides the method, if anything does.
    """
    from pore.evaluation.reweighting import biases_named, reweighted

    if options.unpruned:
        return None
    # After several images the text begins at other distances than after one.
    some = shown if len(shown) == 1 else []
    biases = biases_named(options.reweight, options.allow or (), model, processor, some)
    pruner = method_of(options, model, keep, guide=guiding)
    return pruner if biases is None else reweighted(pruner, biases)
