"""Conversations with images put to a model, batch by batch, pruned or not."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import PIL.Image
import torch

from pore._images import open_image
from pore.data.prompts import Prompt, prompt_inputs, render_messages
from pore.engine.pruner import Pruner
from pore.errors import InputError
from pore.evaluation.effort import Effort, pruned_efforts, unpruned_efforts
from pore.evaluation.features import MEMORY, Memory, encoding_once
from pore.evaluation.guided import with_guide

_log = logging.getLogger(__name__)

LONGEST = 1024
"""Tokens of an answer where a task does not say, as in LLaVA's own evaluation of free answers."""

# What tasks ask of `generate`, by the names that transformers has for it.
_GENERATED = ("max_new_tokens", "num_beams", "repetition_penalty")
_SAMPLED = ("temperature", "top_p", "top_k")

# lmms-eval's default where a task names no end. Answers of several paragraphs hold it.
_PARAGRAPH = "\n\n"


@dataclass(frozen=True)
class Conversation:
    """What a model is asked.

    Attributes:
        id: Names it in messages.
        messages: The conversation as chat templates take it, see `render_messages`.
        images: Its images, in their order: images, files or encoded bytes.
    """

    id: str
    messages: Sequence[Mapping[str, Any]]
    images: Sequence[Any] = ()


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded.

    Attributes:
        options: Keywords of `generate`.
        ends: Texts at which an answer is cut off.
        ignored: Names that the task gives and that mean nothing here.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    ends: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Decoding:
        """Read the generation settings of a task of lmms-eval.

        Answers are greedy, unless the task gives a temperature above 0 without forbidding to
        sample, or asks for sampling without a temperature.

        Args:
            given: Such as `{"max_new_tokens": 16, "temperature": 0, "until": ["\\n"]}`.

        Returns:
            The settings.
        """
        temperature = given.get("temperature")
        wanted = given.get("do_sample")
        samples = wanted is not False and (bool(temperature) or (temperature is None and wanted))
        names = (*_GENERATED, *(_SAMPLED if samples else ()))
        options = {name: given[name] for name in names if given.get(name) is not None}
        # What a checkpoint sets for sampling does not matter then, and transformers warns of it.
        unset = {} if samples else dict.fromkeys(_SAMPLED)
        ends = given.get("until") or ()
        used = {*_GENERATED, *_SAMPLED, "do_sample", "until"}
        return cls(
            {"max_new_tokens": LONGEST, **unset, **options, "do_sample": bool(samples)},
            tuple(
                e for e in ([ends] if isinstance(ends, str) else ends) if e not in ("", _PARAGRAPH)
            ),
            tuple(sorted(given.keys() - used)),
        )

    def cut(self, text: str) -> str:
        """An answer up to the first of its ends."""
        for end in self.ends:
            text = text.split(end)[0]
        return text.strip()


@dataclass(frozen=True)
class Reply:
    """An answer of a model.

    Attributes:
        text: The answer.
        input_tokens: Tokens of the prompt, visual ones among them.
        output_tokens: Tokens of the answer, with the one that ends it.
        effort: What the prompt took.
    """

    text: str
    input_tokens: int
    output_tokens: int
    effort: Effort


class Asker:
    """Puts conversations to a model.

    Args:
        model: A supported vision-language model.
        processor: Its processor.
        pruner: The method (SGL's guide a `guided.Guiding`), or None for the unpruned model; it may
            be replaced between two batches.
        memory: Bytes of image features to hold. Where the same pictures come in the same batches
            again, under another method, they do not go through the vision tower again, unless that
            method looks into it.
    """

    def __init__(
        self, model: Any, processor: Any, pruner: Pruner | None = None, *, memory: int = MEMORY
    ) -> None:
        self.model = model
        self.processor = processor
        self.pruner = pruner
        self._told: set[str] = set()
        self._features = Memory(memory)

    def ask(self, conversations: Sequence[Conversation], decoding: Decoding) -> list[Reply]:
        """Put a batch of conversations to the model.

        Args:
            conversations: One or more, all of them with images or all without.
            decoding: How answers are decoded.

        Returns:
            An answer to each, in their order.

        Raises:
            InputError: An image cannot be read, or the processor refuses the conversations.
            PoreError: The method does not fit the model or the images.
        """
        for name in decoding.ignored:
            self._tell(f"The generation setting {name!r} of the task means nothing to this model.")
        pruner = self.pruner
        if pruner is None or not pruner.draws:
            return self._replies(conversations, decoding, pruner)
        replies = []
        for each in conversations:
            # By chance of its own, whatever else is asked by this process, and before.
            drawing = replace(pruner, seed=_seed(pruner, each.id))  # type: ignore[type-var]
            replies += self._replies([each], decoding, drawing)
        return replies

    def _replies(
        self, conversations: Sequence[Conversation], decoding: Decoding, pruner: Pruner | None
    ) -> list[Reply]:
        prompts = [self._prompt(each) for each in conversations]
        model = self.model
        resize = None if pruner is None else pruner.resizing(model, self.processor)
        inputs = prompt_inputs(self.processor, prompts, model.device, model.dtype, resize)
        looks = pruner is not None and (pruner.reads_tower or pruner.resizes)
        once = nullcontext() if looks else encoding_once(model, self._features)
        with torch.inference_mode(), once:
            longest = int(decoding.options["max_new_tokens"])
            pruner = with_guide(pruner, prompts, inputs, longest)
            with nullcontext() if pruner is None else pruner(model) as run:
                tokens = model.generate(**inputs, **decoding.options)
        efforts = unpruned_efforts(model, inputs) if run is None else pruned_efforts(run.report)
        beams = len(efforts) // len(prompts)  # a prompt is prefilled once for each
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [
            Reply(decoding.cut(text), length, written, effort)
            for text, length, written, effort in zip(
                self.processor.batch_decode(new, skip_special_tokens=True),
                inputs["attention_mask"].sum(-1).tolist(),
                _lengths(new, model.generation_config.eos_token_id),
                efforts[::beams],
                strict=True,
            )
        ]

    def release(self) -> None:
        """Let go of all features that are held."""
        self._features.clear()

    def _prompt(self, asked: Conversation) -> Prompt:
        try:
            text = render_messages(self.processor, asked.messages)
            images = [_opened(image) for image in asked.images]
        except InputError as error:
            raise InputError(f"{asked.id}: {error}") from error
        for message in asked.messages:
            said = [part.get("text", "") for part in message["content"]]
            if message["role"] == "system" and not all(part.strip() in text for part in said):
                self._tell("The chat template of this model leaves the task's system prompt out.")
        return Prompt(asked.id, text, images)

    def _tell(self, what: str) -> None:
        """Say something once."""
        if what not in self._told:
            self._told.add(what)
            _log.warning(what)


def _opened(image: Any) -> PIL.Image.Image:
    try:
        return open_image(image)
    except Exception as error:  # decoders of damaged files raise all kinds of errors
        raise InputError(f"an image cannot be read: {type(error).__name__}: {error}") from error


def _seed(pruner: Any, name: str) -> int:
    """The seed of a prompt, from that of the method and the prompt's name."""
    return int(hashlib.sha256(f"{pruner.seed} {name}".encode()).hexdigest()[:15], 16)


def _lengths(tokens: torch.Tensor, ends: int | Sequence[int] | None) -> list[int]:
    """Tokens of every row up to the one that ends it."""
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    return [
        next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        for row in tokens.tolist()
    ]
