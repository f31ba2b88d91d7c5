"""Features of images, made once for all settings that do not look into the vision tower."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any, TypeVar

import torch

from pore._compat.models import ENCODE_IMAGES, ENCODE_VIDEOS, UNREAD
from pore.families.registry import family_of

_Value = TypeVar("_Value")

MEMORY = 2 << 30
"""Bytes of inputs and features that an evaluation holds: those of 455 images of LLaVA-1.5-7B."""


@contextmanager
def encoding_once(model: Any, memory: Memory) -> Iterator[None]:
    """Inside the block, images and videos that were encoded before are not encoded again.

    What is remembered is a whole call of the encoder: alone, an image gets other last bits than
    among others. So all that follows is to the bit as without the block. Methods that look into the
    vision tower must not be used in it, as they would see nothing.

    Args:
        model: The model; it is left as it was.
        memory: What remembers, also for the next block.
    """
    base: Any = family_of(model).base(model)
    names = [name for name in (ENCODE_IMAGES, ENCODE_VIDEOS) if hasattr(base, name)]
    had = {name: vars(base)[name] for name in names if name in vars(base)}
    try:  # not by `Changes`, which would have the model refuse to be pruned meanwhile
        for name in names:
            setattr(base, name, _once(name, getattr(base, name), memory))
        yield
    finally:
        for name in names:
            vars(base).pop(name, None)
        vars(base).update(had)


def _once(name: str, encode: Callable[..., Any], memory: Memory) -> Callable[..., Any]:
    @functools.wraps(encode)  # `generate` reads the signature
    def once(*args: Any, **kwargs: Any) -> Any:
        key = name, _digest((args, sorted(kwargs.items())))
        made = memory.get(key)
        if made is None:
            made = memory.hold(key, _read(encode(*args, **kwargs)))
        return copy(made)

    return once


def _read(output: Any) -> Any:
    """An encoder's output without what is not read of it and would fill the memory."""
    if not isinstance(output, Mapping):
        return output
    kept: Any = type(output)(**{name: output[name] for name in output if name not in UNREAD})
    for name, value in vars(output).items():  # features that are no field, as of Gemma 4 in 5.16
        if name not in UNREAD and getattr(kept, name, None) is None:
            setattr(kept, name, value)
    return kept


def _digest(value: Any) -> str:
    """A digest of tensors, in tuples and lists, and of what says by its text what it is."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            plain = value.detach().cpu().reshape(-1).view(torch.uint8)
            digest.update(plain.numpy().data)
        elif isinstance(value, (list, tuple)):
            digest.update(f"{len(value)} ".encode())
            for each in value:
                add(each)
        else:
            digest.update(repr(value).encode())

    add(value)
    return digest.hexdigest()


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
    if isinstance(value, Mapping):  # that of an encoder may hold more in its attributes
        return sum(map(_bytes, {**getattr(value, "__dict__", {}), **value}.values()))
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0
