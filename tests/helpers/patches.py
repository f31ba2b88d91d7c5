"""Changes that a new transformers might bring, made to the installed one."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pore.families.registry import family_of

Patches = Iterator[Any]


def renamed(model: Any, old: str, where: str = "layer") -> Patches:
    """An argument has another name in decoder layers, in the "decoder" or in the "base" model."""
    family, new = family_of(model), f"other_{old}"
    modules = {
        "layer": family.layers(model),
        "decoder": [family.decoder(model)],
        "base": [family.base(model)],
    }
    for kind in {type(module) for module in modules[where]}:
        call, forward = kind.__call__, kind.forward

        def called(self: Any, *args: Any, call: Any = call, **kwargs: Any) -> Any:
            if old in kwargs:
                kwargs[new] = kwargs.pop(old)
            return call(self, *args, **kwargs)

        def renaming(self: Any, *args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            if new in kwargs:
                kwargs[old] = kwargs.pop(new)
            return forward(self, *args, **kwargs)

        signature = inspect.signature(forward)
        named = [
            one.replace(name=new) if one.name == old else one
            for one in signature.parameters.values()
        ]
        renaming.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
        yield mock.patch.object(kind, "__call__", called)
        yield mock.patch.object(kind, "forward", renaming)


def without_masks(model: Any) -> Patches:
    """The function that makes a kernel's masks makes none."""
    none = {"sdpa": lambda *_, **__: None}
    yield mock.patch.dict(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, none)


def without_the_model_s_masks(model: Any) -> Patches:
    """The model makes no masks for its layers."""
    module = sys.modules[type(family_of(model).decoder(model)).__module__]
    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        if hasattr(module, name):
            yield mock.patch.object(module, name, return_value=None)


def shifted(model: Any, where: Callable[[int], bool]) -> Patches:
    """Rotary tables of some forwards, by their tokens, are those of the next position."""
    kind = type(family_of(model).decoder(model).rotary_emb)
    forward = kind.forward

    def later(self: Any, x: Any, position_ids: Any, *args: Any, **kwargs: Any) -> Any:
        more = int(where(position_ids.shape[-1]))
        return forward(self, x, position_ids + more, *args, **kwargs)

    yield mock.patch.object(kind, "forward", later)


def shifted_ids(model: Any) -> Patches:
    """The decoder counts from another position."""
    kind = type(family_of(model).decoder(model))
    forward = kind.forward

    @functools.wraps(forward)
    def later(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + 1
        return forward(self, *args, **kwargs)

    yield mock.patch.object(kind, "forward", later)


def cached(change: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Any], Patches]:
    """What a cache returns for a new token is changed."""
    update = DynamicLayer.update

    def changed(self: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        found = update(self, key, value, *args, **kwargs)
        return change(*found) if key.shape[2] == 1 else found

    return lambda _: iter([mock.patch.object(DynamicLayer, "update", changed)])


def emptied(keys: Any, values: Any) -> tuple[Any, Any]:
    """As if everything cached were lost."""
    lost = torch.arange(keys.shape[2]) < keys.shape[2] - 1
    return keys.masked_fill(lost[:, None], 0.0), values.masked_fill(lost[:, None], 0.0)


def kernel(change: Callable[..., Any]) -> Callable[[Any], Patches]:
    """SDPA gets other arguments."""
    real = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def changed(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> Any:
        if query.shape[1] != 4:  # the tower's
            return real(module, query, key, value, attention_mask=attention_mask, **kwargs)
        return real(module, *change(query, key, value, attention_mask), **kwargs)

    patch = mock.patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, {"sdpa": changed})
    return lambda _: iter([patch])


@contextmanager
def patched(make: Callable[[Any], Patches], model: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for patch in list(make(model)):
            stack.enter_context(patch)
        yield
