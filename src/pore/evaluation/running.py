"""Asking a model questions, pruned and unpruned, through `generate` as anybody would call it."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch

from pore.errors import InputError, UnsupportedModelError
from pore.evaluation.answers import is_right
from pore.evaluation.outcome import Answer, Outcome
from pore.families import family_of
from pore.flops import model_flops
from pore.prompts import build_inputs
from pore.pruner import Pruner
from pore.samples import Sample
from pore.shapes import ModelShape

Progress = Callable[[int], None]
"""Told after every batch how many more samples are done."""

Told = Callable[[str, float], None]
"""Told what is being done and what share of all is done."""

# What a forward needs beside image features; with anything else, features are not all there is.
_PLAIN = {"input_ids", "attention_mask", "pixel_values"}


class Batches:
    """Model inputs of samples in batches, made once and used by one method after the other.

    Where transformers takes image features for pixels (`mm_encoder_outputs`), the vision tower too
    runs once per image; the decoder gets the very features that it would have computed.

    Args:
        model: The model that the inputs are for.
        processor: Its processor.
        samples: The samples; each needs an answer.
        batch_size: Samples of a batch.
        memory: Bytes that may be held; batches beyond are made again for every method.

    Raises:
        InputError: There is no sample, or one has no answer to compare with.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        samples: Sequence[Sample],
        *,
        batch_size: int = 32,
        memory: int = 2 << 30,
    ) -> None:
        if not samples:
            raise InputError("There are no samples to evaluate on.")
        if batch_size < 1:
            raise InputError(f"A batch has at least 1 sample, not {batch_size}.")
        for sample in samples:
            if sample.answer is None:
                raise InputError(f"Sample {sample.id!r} has no answer to compare with.")
        self.model = model
        self.processor = processor
        self.samples = tuple(samples)
        self.batch_size = batch_size
        self._left = memory
        self._inputs: dict[int, dict[str, Any]] = {}
        self._encoded: dict[int, dict[str, Any]] = {}
        self._encodes = "mm_encoder_outputs" in inspect.signature(model.forward).parameters

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def batch(self, i: int) -> tuple[Sample, ...]:
        """The samples of a batch."""
        return self.samples[i * self.batch_size : (i + 1) * self.batch_size]

    def inputs(self, i: int) -> dict[str, Any]:
        """The inputs of a batch as the processor gives them, pixels and all."""
        if i in self._inputs:
            return self._inputs[i]
        model = self.model
        made: dict[str, Any] = dict(
            build_inputs(self.processor, self.batch(i), model.device, model.dtype)
        )
        return self._hold(self._inputs, i, made)

    def encoded(self, i: int) -> dict[str, Any]:
        """The inputs of a batch with image features for pixels, where the model takes them."""
        if i in self._encoded:
            return self._encoded[i]
        inputs = self.inputs(i)
        if not self._encodes or not inputs.keys() <= _PLAIN or "pixel_values" not in inputs:
            return inputs
        rest = dict(inputs)
        output = self.model.get_image_features(pixel_values=rest.pop("pixel_values"))
        # Only what the decoder reads; the tower's hidden states would fill the memory.
        rest["mm_encoder_outputs"] = {"image": type(output)(pooler_output=output.pooler_output)}
        self._inputs.pop(i, None)
        return self._hold(self._encoded, i, rest)

    def _hold(
        self, where: dict[int, dict[str, Any]], i: int, made: dict[str, Any]
    ) -> dict[str, Any]:
        size = sum(_bytes(value) for value in made.values())
        if size <= self._left:
            self._left -= size
            where[i] = made
        return made


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(_bytes(entry) for entry in value.values())
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[Sample] | Batches,
    pruner: Pruner | None = None,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    progress: Progress | None = None,
) -> Outcome:
    """Ask a model questions, and compare its greedy answers with the right ones.

    An answer is right when it is the expected one, both normalised (`answers.normalise`).

    Args:
        model: A supported vision-language model of transformers.
        processor: Its processor.
        samples: Samples with answers; `Batches` to share their preparation between methods.
        pruner: The method, or None for the unpruned model.
        batch_size: Samples of a batch; that of `Batches` is its own.
        max_new_tokens: Longest answer.
        progress: Told how many more samples are done.

    Returns:
        One answer per sample, in their order.

    Raises:
        PoreError: A sample has no answer, or the method does not fit the model.
    """
    batches = samples
    if not isinstance(batches, Batches):
        batches = Batches(model, processor, batches, batch_size=batch_size)
    pixels = pruner is not None and pruner.reads_tower
    given: list[str] = []
    effort: list[dict[str, Any]] = []
    with torch.inference_mode(), nullcontext() if pruner is None else pruner(model) as run:
        for i in range(len(batches)):
            inputs = batches.inputs(i) if pixels else batches.encoded(i)
            if run is None:
                effort += _unpruned(model, inputs)
            tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            new = tokens[:, inputs["input_ids"].shape[1] :]
            given += processor.batch_decode(new, skip_special_tokens=True)
            if progress is not None:
                progress(len(new))
    if run is not None:
        effort = [
            {
                "kept": tuple(image.kept for image in sample.images),
                "flops": sample.flops,
                "extra": sum(image.extra for image in sample.images),
                "mean_tokens": sample.mean_visual_tokens,
            }
            for sample in run.report
        ]
    return Outcome(
        pruner,
        tuple(
            Answer(
                id=sample.id,
                question=sample.question,
                expected=str(sample.answer),
                given=text.strip(),
                right=is_right(text, str(sample.answer)),
                kind=sample.kind,
                third=sample.third,
                **spent,
            )
            for sample, text, spent in zip(batches.samples, given, effort, strict=True)
        ),
    )


def _unpruned(model: Any, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The visual tokens of every sample, all kept, and the FLOPs of its prefill."""
    family = family_of(model)
    layers = len(family.layers(model))
    images = family.images(model, inputs)
    lengths = inputs["attention_mask"].sum(-1).tolist()
    shape = None
    with suppress(UnsupportedModelError):
        shape = ModelShape.from_config(model.config)
    for row, length in enumerate(lengths):
        own = [image for image in images if image.row == row]
        towers, flops = sum(image.tiles for image in own), None
        if shape is not None:
            flops = model_flops(shape, [length] * layers, images=towers).total
        yield {
            "kept": tuple(tuple(range(len(image.columns))) for image in own),
            "flops": flops,
            "mean_tokens": float(sum(len(image.columns) for image in own)),
        }


def time_prefill(
    model: Any,
    batches: Batches,
    pruners: Sequence[Pruner | None],
    *,
    count: int = 2,
    rounds: int = 5,
    progress: Progress | None = None,
) -> list[float]:
    """Measure the prefill of every method, from pixels to the logits of the first token.

    Methods take turns within each round, so that a machine that slows down slows all of them, and
    each runs once before anything is measured.

    Args:
        model: The model.
        batches: Inputs; the first `count` batches are used.
        pruners: The methods; None is the unpruned model.
        count: Batches per measurement.
        rounds: Measurements per method.
        progress: Told how many more samples are done.

    Returns:
        For each method the median time in milliseconds per sample.
    """
    inputs = [batches.inputs(i) for i in range(min(count, len(batches)))]
    samples = sum(len(batch["input_ids"]) for batch in inputs)
    seconds: list[list[float]] = [[] for _ in pruners]
    for measured in [False] + [True] * rounds:
        for times, pruner in zip(seconds, pruners, strict=True):
            with torch.inference_mode(), nullcontext() if pruner is None else pruner(model):
                _synchronise(model)
                began = time.perf_counter()
                for batch in inputs:
                    model(**batch, use_cache=True, logits_to_keep=1)
                _synchronise(model)
                if measured:
                    times.append(time.perf_counter() - began)
            if progress is not None:
                progress(samples)
    return [1e3 * statistics.median(times) / samples for times in seconds]


def cost(pruner: Pruner | None, visual: int, layers: int) -> float:
    """About what a question costs, in units of the unpruned model's: for progress bars only.

    Args:
        pruner: The method, or None for the unpruned model.
        visual: Visual tokens of an image.
        layers: Decoder layers.

    Returns:
        The cost.
    """
    if pruner is None:
        return 1.0
    return 0.25 + 0.75 * sum(pruner.counts(visual, layers)) / (visual * layers)


class Work:
    """How far a job of many parts is, as a share of all its work.

    Args:
        total: All work, in any unit.
        told: Told what is being done and what share is done.
    """

    def __init__(self, total: float, told: Told | None) -> None:
        self._total = total
        self._told = told
        self._so_far = 0.0
        self._what = ""

    def start(self, what: str) -> None:
        """Say what comes now."""
        self._what = what
        self._tell()

    def done(self, each: float) -> Progress:
        """A function to be told how many more things of a cost are done."""

        def advance(count: int) -> None:
            self._so_far += count * each
            self._tell()

        return advance

    def through(self, samples: Sequence[Sample], each: float) -> Iterator[Sample]:
        """The samples, counted as they are taken."""
        advance = self.done(each)
        for sample in samples:
            yield sample
            advance(1)

    def finish(self) -> None:
        """Say that all is done."""
        self._so_far, self._what = self._total, "done"
        self._tell()

    def _tell(self) -> None:
        if self._told is not None:
            self._told(self._what, min(1.0, self._so_far / self._total))


def _synchronise(model: Any) -> None:
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
