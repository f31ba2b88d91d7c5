"""A tap beside the attention of one layer feeds the reader of a stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pore._compat.arguments import HIDDEN, MASK
from pore._compat.attention import layer_number
from pore._compat.caches import cache_in, without_cache
from pore.changes import Changes
from pore.engine.cache import keys_before
from pore.engine.calls import Calls
from pore.engine.corrections import AttentionCorrection, seen_through
from pore.engine.dropping import is_idle
from pore.engine.forward import Forward
from pore.engine.layer_inputs import LayerInputs
from pore.engine.layers import kwargs_for
from pore.engine.prefill import Reading
from pore.engine.readers import LayerAttention, Reader
from pore.engine.setup import Setup
from pore.engine.stages import Stage
from pore.engine.without_rope import Plain, WithoutRope
from pore.errors import UnsupportedModelError
from pore.hooks import tap_attention


class _Seen(Exception):
    """Ends a layer that ran in advance, once its attention is known."""


def tap_readers(changes: Changes, setup: Setup, calls: Calls) -> None:
    """Show every reader the attention of its layer.

    Args:
        changes: What takes the taps off.
        setup: The method in the model.
        calls: Its calls.
    """
    for layer in dict.fromkeys(stage.reads_layer for stage in setup.inner if stage.attention):
        assert layer is not None
        attention = setup.family.attention(setup.layers[layer])
        plain = WithoutRope(attention)
        for stage in setup.inner:
            if stage.attention is not None and stage.reads_layer == layer:
                wanted = partial(_wanted, calls, stage)
                plain.note(changes, wanted)
                observe = _observer(setup, calls, stage, stage.attention, layer, plain)
                tap_attention(changes, attention, observe, wanted=wanted)
        plain.tap(changes)


def _wanted(calls: Calls, stage: Stage) -> bool:
    """Whether a stage's reader is to read: there are images, and the layer runs as it wants."""
    forward = None if calls.inside is None else calls.inside.forward
    if forward is None or forward.visual is None or is_idle(forward.visual, stage):
        return False
    return (forward.ahead is not None) == stage.ahead


def _observer(
    setup: Setup, calls: Calls, stage: Stage, read: Reader, layer: int, without: WithoutRope
) -> Callable[..., None]:
    window = setup.windows[layer]

    def observe(
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
        causal: bool,
        value: Tensor,
    ) -> None:
        forward, length = calls.forward, query.shape[2]
        visual = forward.visual
        if visual is None:
            return
        visual.layout = layout = visual.layout.to(query.device)
        key, past = _with_cached(setup, forward, key, length, layer)
        again, found = without.taken(), list[Plain]()

        def plain() -> tuple[Tensor, Tensor]:
            if layer in setup.sources:
                raise UnsupportedModelError(
                    f"Decoder layer {layer} looks at keys of layer {setup.sources[layer]}, which "
                    f"RoPE has turned already, so {setup.method.name} cannot have them without; "
                    f"use layers before {min(setup.sources)}."
                )
            if not found:
                found.append(again())
            return found[0].query, found[0].key

        origin = forward.left.index
        if origin is None:
            origin = torch.arange(length, device=query.device).expand(len(query), -1)
        attention = LayerAttention(
            layout=layout,
            query=query,
            key=key,
            mask=mask,
            scaling=scaling,
            softcap=softcap,
            causal=causal,
            past=past,
            origin=origin.to(query.device),
            memory=visual.memory.get(stage.prepare),
            window=window if window is not None and window < forward.entered.span else None,
            hides=forward.entered.masks is not None,
            plain=plain,
            value=value,
        )
        visual.attention, visual.beside = _read(stage, read, attention)
        reading = Reading(layer, sum(attention.read), stage.ahead + len(found), layout)
        visual.prefill.readings.append(reading)
        if stage.ahead:
            raise _Seen

    return observe


def _read(stage: Stage, read: Reader, attention: LayerAttention) -> tuple[Any, Any]:
    """What a stage's reader takes of its layer, and what its correction reads beside that."""
    if not isinstance(stage.correction, AttentionCorrection):
        return read(attention), None
    attention, beside = seen_through(stage.correction, attention, stage.bias_at)
    return read(attention), beside


def _with_cached(
    setup: Setup, forward: Forward, key: Tensor, length: int, layer: int
) -> tuple[Tensor, Tensor]:
    """Keys with those in the cache first, and (B, p) bool, False at padding, of the latter."""
    if forward.ahead is None:  # a cache lets go of what is out of a sliding window
        past = forward.past.to(key.device)
        return key, past[:, max(past.shape[1] + length - key.shape[2], 0) :]
    keys, past = forward.ahead
    past = past.to(key.device)
    if keys is not None and past.shape[1]:
        key = _put_before(setup, keys, key, layer)
    return key, past


def _put_before(setup: Setup, cached: Tensor, key: Tensor, layer: int) -> Tensor:
    """(B, G, n + m, d) cached keys and those of this call: a layer run ahead gets no cache."""
    if cached[:, :, :0].shape != key[:, :, :0].shape:
        raise UnsupportedModelError(
            f"The cache of decoder layer {layer} holds latent states in place of keys, so "
            f"{setup.method.name} cannot look at them ahead of it; give every prompt with images a "
            "cache of its own."
        )
    return torch.cat([cached.to(key), key], 2)


def look_ahead(
    setup: Setup,
    forward: Forward,
    number: int,
    hidden: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Run the layer of a stage up to its attention, whose tap then reads it and stops.

    Args:
        setup: The method in the model.
        forward: What the call knows.
        number: Which of `setup.inner` the stage is.
        hidden: (B, m, D) the states that enter the layer.
        args: The layer's arguments.
        kwargs: Its keyword arguments.
    """
    layer: Any = setup.layers[setup.inner[number].layer]
    cache, given, i = (
        cache_in(kwargs),
        kwargs.get(MASK),
        layer_number(setup.family.attention(layer)),
    )
    past = forward.cached(number)
    short = LayerInputs(setup, forward.entered, forward.left.index, forward.extended(past))
    ahead: tuple[Tensor | None, Tensor] = None, past.valid
    if i in setup.sources:
        kwargs = kwargs_for(setup, forward, short, i, i, kwargs, hidden)
    else:
        ahead = keys_before(cache, i, past.valid, hidden.shape[1])
        if forward.short is not None:
            kwargs = kwargs_for(setup, forward, forward.short, i, i, kwargs, hidden)
        kwargs = {**kwargs, MASK: short.masks.mask(given, hidden, cache, i)}
    # What it computes is not to be cached.
    kwargs = without_cache(kwargs)
    if not args:
        kwargs[HIDDEN] = hidden
    forward.ahead = ahead
    try:
        with torch.no_grad():  # only to be scored by
            # Past the hooks of the layer, of which this is one.
            layer.forward(*([hidden, *args[1:]] if args else []), **kwargs)
    except _Seen:
        pass
    finally:
        forward.ahead = None
