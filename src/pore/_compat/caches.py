"""The key-value cache: finding it among arguments, reading it, and following what is done to it.

`transformers.Cache` is public; that it has `layers[i].keys`, how it counts, and when `generate`
repeats, reorders or crops its rows are not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pore._compat.arguments import CACHE
from pore.errors import InputError, UnsupportedModelError


@lru_cache(maxsize=1)
def _cache_class() -> type:
    from transformers import Cache  # late: it takes transformers seconds

    kind: type = Cache
    return kind


def cache_in(values: Mapping[str, Any] | Iterable[Any] | None) -> Any:
    """The cache among arguments or outputs, whatever its name there; None if there is none.

    Args:
        values: Arguments by name, a `ModelOutput`, or a tuple.
    """
    kind = _cache_class()
    given = values.values() if isinstance(values, Mapping) else values or ()
    return next((value for value in given if isinstance(value, kind)), None)


def without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with None in place of the cache."""
    kind = _cache_class()
    return {name: None if isinstance(v, kind) else v for name, v in kwargs.items()}


def cache_argument(function: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """The cache as an argument of a function of transformers, by the name that the function uses.

    Args:
        function: The forward of a model, a decoder or a layer, or what makes masks.
        cache: A cache, or None.

    Raises:
        UnsupportedModelError: The function takes no cache by a name that pore knows.
    """
    names = inspect.signature(function).parameters
    name = next((name for name in CACHE if name in names), None)
    if name is None:
        raise UnsupportedModelError(
            f"{getattr(function, '__qualname__', function)} takes no cache by a name that this "
            f"version of pore knows ({', '.join(CACHE)}); use a version of transformers that it "
            "was tested with, or a newer pore."
        )
    return {name: cache}


@lru_cache(maxsize=64)
def _unread(forward: Callable[..., Any]) -> tuple[str | None, tuple[str, ...]]:
    """The name by which a forward takes a cache, and the newer names, which it does not know."""
    names = inspect.signature(forward).parameters
    known = next((name for name in CACHE if name in names), None)
    return known, () if known is None else CACHE[: CACHE.index(known)]


def check_cache_name(kind: type, kwargs: Mapping[str, Any]) -> None:
    """Refuse a cache that is given by a newer name than this transformers knows.

    Newer versions take the older name too, and say that it is deprecated. Older ones take the newer
    name without a word, and fill a cache of their own.

    Args:
        kind: The class of a model.
        kwargs: The keyword arguments that it is called with.

    Raises:
        InputError: The cache would not be read.
    """
    known, unread = _unread(kind.forward)  # type: ignore[attr-defined]
    for name in unread:
        if kwargs.get(name) is not None:
            import transformers

            raise InputError(
                f"{kind.__name__} of transformers {transformers.__version__} does not know the "
                f"argument {name}, and would make a cache of its own; pass the cache as {known}."
            )


def slots_of(cache: Any, length: int, layer: int) -> int:
    """Number of keys that a layer's kernel gets for `length` new tokens: cached and new ones.

    transformers takes the size of masks from `get_mask_sizes`; a sliding layer's cache drops some
    keys, a static one has empty slots at its end.
    """
    slots: int = cache.get_mask_sizes(length, layer)[0]
    return slots


def sliding_layers(cache: Any) -> list[bool]:
    """For every layer of a cache, whether it forgets tokens outside a window: `is_sliding`."""
    return list(getattr(cache, "is_sliding", ()))


def has_static_slots(cache: Any) -> bool:
    """Whether a cache has its slots from the start, for which transformers makes masks early.

    `generate` decides by `is_compileable`.
    """
    return bool(getattr(cache, "is_compileable", False))


def cached_keys(cache: Any, layer: int) -> Tensor | None:
    """(B, G, n, d) keys that a layer has in the cache; None before it has any.

    `layers[i].keys`; no public function reads what a cache holds. A quantised cache has only
    its latest keys there and the earlier ones in `_quantized_keys`, whose samples are still in the
    order from before beams were reordered (`_pending_beam_idx`, since transformers 5.23).
    """
    layers = getattr(cache, "layers", ())
    if layer >= len(layers):
        return None
    held = layers[layer]
    keys: Tensor | None = getattr(held, "keys", None)
    earlier = getattr(held, "_quantized_keys", None)
    if earlier is None or keys is None:
        return keys
    earlier = held._dequantize(earlier)
    order = getattr(held, "_pending_beam_idx", None)
    if order is not None:
        earlier = earlier.index_select(0, order.to(earlier.device))
    return torch.cat([earlier, keys.to(earlier)], -2)
