"""Features of images, made once for all settings that do not look into the vision tower."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import torch

_Value = TypeVar("_Value")

MEMORY = 2 << 30
"""Bytes of inputs and features that an evaluation holds: those of 455 images of LLaVA-1.5-7B."""

# Inputs that image features can replace pixels among; with others, features are not enough.
_PLAIN = {"input_ids", "attention_mask", "pixel_values"}


def with_features(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a batch, with image features in place of pixels if the model takes them.

    The decoder gets the features that the model itself would compute from these pixels.

    Args:
        model: The model.
        inputs: Its processor's output.

    Returns:
        The inputs; those that were given if the model needs the pixels, or there are none.
    """
    rest = dict(inputs)
    takes = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    if not takes or not rest.keys() <= _PLAIN or "pixel_values" not in rest:
        return rest
    output = model.get_image_features(pixel_values=rest.pop("pixel_values"))
    # Only what the decoder reads; the tower's hidden states would fill the memory.
    rest["mm_encoder_outputs"] = {"image": type(output)(pooler_output=output.pooler_output)}
    return rest


class Memory:
    """Holds tensors up to a number of bytes; what comes when it is full is not held.

    A sweep asks all questions under one setting before the next, so letting the oldest go would let
    everything go before it is needed again.

    Args:
        limit: The number of bytes.

    Attributes:
        left: How many of them are free.
    """

    def __init__(self, limit: int = MEMORY) -> None:
        self.left = limit
        self._held: dict[Hashable, Any] = {}

    def get(self, name: Hashable) -> Any:
        """What is held under a name; None if nothing is."""
        return self._held.get(name)

    def hold(self, name: Hashable, value: _Value) -> _Value:
        """Hold a value if there is room for its tensors, and return it.

        Args:
            name: A name that nothing is held under.
            value: A tensor, or mappings, lists and tuples of tensors.
        """
        size = _bytes(value)
        if size <= self.left:
            self.left -= size
            self._held[name] = value
        return value

    def drop(self, name: Hashable) -> None:
        """Let a value go, if it is held."""
        self.left += _bytes(self._held.pop(name, ()))

    def clear(self) -> None:
        """Let everything go."""
        for name in list(self._held):
            self.drop(name)


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(_bytes(entry) for entry in value.values())
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0
