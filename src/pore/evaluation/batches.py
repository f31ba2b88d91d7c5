"""Samples as model inputs, batch by batch."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pore.errors import InputError
from pore.families import identity
from pore.prompts import build_inputs, processor_settings, prompt_template
from pore.samples import Sample

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


def conditions(model: Any, processor: Any) -> dict[str, Any]:
    """What answers depend on beside the samples and how they are asked, as JSON gives it back.

    Args:
        model: The model.
        processor: Its processor.

    Returns:
        The model's identity and floating type, the processor's settings and the prompt template.
    """
    found = {
        **identity(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "processor": processor_settings(processor),
        "template": prompt_template(processor),
    }
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]
