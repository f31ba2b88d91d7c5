"""`pore chat`: several questions about the same images, over one cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pore._text import for_terminal
from pore.cli.answering import (
    Answering,
    Files,
    MaxNewTokens,
    content_of,
    pruner_for,
    sampling,
    shown_in,
)
from pore.cli.options import Loading, budgets, takes
from pore.cli.printing import complain, say
from pore.errors import InputError, PoreError

if TYPE_CHECKING:
    from torch import Tensor

    from pore.data.samples import Sample
    from pore.engine.pruner import Pruner
    from pore.engine.run import Run

_IMAGE = "/image"

# Stands for an answer in a template, to find what the template writes between two turns.
_ANSWER = "the-answer-of-the-model"


@dataclass(frozen=True, kw_only=True)
class Options(Loading, Answering):
    """The options of `pore chat`."""

    files: Files
    max_new_tokens: MaxNewTokens = 256


@takes(Options)
def chat(options: Options) -> None:
    """Talk about images or a video, one question a line.

    Answers are printed word by word. The images are pruned with the first question, and all later
    questions use what it kept: with a small budget, ask the most important question first. A line
    "/image PATH" shows another image with the next question, which is then pruned for that
    question. Ctrl-D ends the conversation. Questions may come from a pipe too.

    Examples:

        pore chat scene.png --keep 25%

        pore chat photo.jpg -m llava-hf/llava-1.5-7b-hf --keep 128 --temperature 0.7 --top-p 0.9

        printf 'What color is the circle?\\nWhere is it?\\n' | pore chat scene.png
    """
    import torch

    from pore.data.loading import load_model

    shown = [shown_in(path, options.frames) for path in options.files]
    how = sampling(options)
    (keep,) = budgets([options.keep] if options.keep else None, options.settings)
    model, processor = load_model(options.model, **options.how)
    pruner = pruner_for(options, model, processor, keep, shown)
    block: AbstractContextManager[Run | None] = nullcontext() if pruner is None else pruner(model)
    with torch.inference_mode(), block as run:
        talk = Conversation(model, processor, pruner, how)
        for line in _lines():
            try:
                if line.startswith("/"):
                    shown.append(_image(line))
                    continue
                turn = talk.turn(line, shown)
            except PoreError as error:  # the conversation is as it was
                complain("Error:", "red", str(error))
                continue
            talk.answer(turn)
            if shown and run is not None:
                images = run.report.samples[-1].images
                left = sum(len(image.kept) + image.extra for image in images)
                seen = sum(image.seen - image.hidden for image in images)
                say(f"Kept {left} of {seen} visual tokens.", style="dim")
            shown.clear()


def _lines() -> Iterator[str]:
    """What is asked, line by line, until the end of the input."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401 - lines can be edited and called again

        say("Ask; /image PATH shows another image; Ctrl-D ends.", style="dim")
    while True:
        try:
            line = input("> ") if terminal else sys.stdin.readline()
        except EOFError:
            typer.echo()
            return
        if not line and not terminal:
            return
        if line.strip():
            yield line.strip()


def _image(line: str) -> Sample:
    """The image that a line names."""
    command, _, path = line.partition(" ")
    if command != _IMAGE or not path.strip():
        raise InputError(f"{line!r} is no command; there is {_IMAGE} PATH, and Ctrl-D ends.")
    return shown_in(Path(path.strip()).expanduser(), frames=1)


class Conversation:
    """Turns over one cache.

    Args:
        model: The model, pruned or not.
        processor: Its processor.
        pruner: The method that prunes it; None unpruned.
        how: How answers are chosen, as keywords of `generate`.
    """

    def __init__(
        self, model: Any, processor: Any, pruner: Pruner | None, how: dict[str, Any]
    ) -> None:
        from transformers import DynamicCache

        self._model, self._processor, self._how = model, processor, how
        self._resize = None if pruner is None else pruner.resizing(model, processor)
        self._cache = DynamicCache(config=model.config.get_text_config())
        self._said: Tensor | None = None

    def turn(self, question: str, shown: Sequence[Sample]) -> dict[str, Any]:
        """The inputs of the next turn; nothing is changed.

        Args:
            question: What is asked.
            shown: The images and videos that come with it.

        Returns:
            The tokens that are not in the cache yet, and what belongs to them.

        Raises:
            InputError: The processor refuses it, or the model takes no further images.
        """
        import torch

        message = {"role": "user", "content": content_of(shown, question)}
        if self._said is None:
            return self._inputs(message, shown, first=True)
        self._check_positions(shown)
        new = self._inputs(message, shown, first=False)
        # Of the last answer, the last token is not in the cache.
        before = self._said[:, -1:]
        length = new["input_ids"].shape
        for name, value in new.items():
            if value.shape == length:  # kinds of tokens, too
                start = before if name == "input_ids" else torch.zeros_like(before)
                new[name] = torch.cat([start.to(value), value], 1)
        total = self._said.shape[1] + length[1]
        new["attention_mask"] = torch.ones(1, total, dtype=torch.long, device=before.device)
        return new

    def answer(self, turn: dict[str, Any]) -> None:
        """Print the answer to a turn, word by word.

        Args:
            turn: What `turn` returned.
        """
        import torch
        from transformers import TextStreamer

        from pore._compat.caches import cache_argument

        class Printer(TextStreamer):  # type: ignore[misc]
            """Prints text as it comes, with control characters escaped."""

            begun = False

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                text = text if self.begun else text.lstrip()
                self.begun |= bool(text)
                typer.echo(for_terminal(text), nl=stream_end)

        told = Printer(self._processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        found = self._model.generate(
            **turn, **self._how, **cache_argument(self._model.forward, self._cache), streamer=told
        )
        before = [] if self._said is None else [self._said[:, :-1]]
        self._said = torch.cat([*before, found], 1)

    def _check_positions(self, shown: Sequence[Sample]) -> None:
        from pore.families.registry import family_of

        if shown and family_of(self._model).mrope:
            raise InputError(
                "This model gives an image positions of its own only in the first question; begin "
                "another conversation with all of the images."
            )

    def _inputs(
        self, message: dict[str, Any], shown: Sequence[Sample], *, first: bool
    ) -> dict[str, Any]:
        """What a processor makes of a turn: after the template's beginning, or after an answer."""
        from pore._videos import Video
        from pore.data.prompts import Prompt, prompt_inputs, render_messages

        model, processor = self._model, self._processor
        if first:
            text = render_messages(processor, [message])
        else:
            asked = {"role": "user", "content": [{"type": "text", "text": "?"}]}
            said = {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}
            text = render_messages(processor, [asked, said, message]).split(_ANSWER, 1)[1]
            assert self._said is not None
            end = processor.tokenizer.decode(self._said[0, -1:])
            text = text.removeprefix(end).lstrip(" ")  # which the model may have written itself
        if not first and not shown:
            made = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")
            return {"input_ids": made["input_ids"].to(model.device)}
        loaded = [sample.load() for sample in shown]
        prompt = Prompt(
            ", ".join(sample.id for sample in shown),
            text,
            [one for one in loaded if one is not None and not isinstance(one, Video)],
            [one for one in loaded if isinstance(one, Video)],
        )
        inputs = dict(prompt_inputs(processor, [prompt], model.device, model.dtype, self._resize))
        start = processor.tokenizer.bos_token_id
        if not first and start is not None and int(inputs["input_ids"][0, 0]) == start:
            length = inputs["input_ids"].shape
            inputs |= {k: v[:, 1:] for k, v in inputs.items() if v.shape == length}
        return inputs
