"""What every decoder layer gets: fewer tokens from a stage on, and keys of earlier layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from pore._compat.arguments import SHARED_KEYS
from pore.engine.calls import Calls
from pore.engine.dropping import act, choose, decide, is_idle, new_states
from pore.engine.forward import Forward
from pore.engine.layer_inputs import LayerInputs
from pore.engine.records import START
from pore.engine.setup import Setup


def pass_start(setup: Setup, forward: Forward) -> None:
    """Begin with the first layer, where stages forget: of what it has cached some may be hidden."""
    tracks = forward.record.tracks
    if forward.visual is None and START not in tracks:
        return
    known = START in tracks
    tracks[START] = track = forward.extended(forward.cached(START))
    if known:
        forward.short = LayerInputs(setup, forward.entered, None, track)


def pass_stage(setup: Setup, forward: Forward, number: int, hidden: Tensor) -> Tensor:
    """Pass a stage: from here on, the sequence of this call and the cache are shorter.

    Args:
        setup: The method in the model.
        forward: What is known about the call.
        number: Which of `setup.inner` the stage is.
        hidden: (B, m, D) the states that enter its layer.

    Returns:
        (B, k, D) the states of the tokens that stay.
    """
    stage, tracks = setup.inner[number], forward.record.tracks
    visual, acts = forward.visual, False
    if visual is not None and stage.before_mlp:
        decided = visual.decided.pop(number, None)
        acts = decided is not None
        if decided is not None:
            hidden = choose(forward.left, visual, stage.layer, decided, hidden)
    elif visual is not None and not is_idle(visual, stage):
        acts = True
        hidden = act(setup, forward.left, visual, stage, hidden)
    index = forward.left.index
    if number not in tracks and (index is None or not acts):
        return hidden
    tracks[number] = track = forward.extended(forward.cached(number))
    forward.short = LayerInputs(setup, forward.entered, index, track, setup.renumbers(stage))
    return hidden


def decide_before_mlp(setup: Setup, forward: Forward, number: int, hidden: Tensor) -> None:
    """Let a stage decide between attention and MLP of the layer before its own.

    New states are written to `hidden` in place, because the layer itself goes on with this tensor.

    Args:
        setup: The method in the model.
        forward: What is known about the call.
        number: Which of `setup.inner` the stage is.
        hidden: (B, m, D) the states to which the layer has added its attention.
    """
    stage, visual = setup.inner[number], forward.visual
    if visual is None or is_idle(visual, stage):
        return
    decided = decide(setup, forward.left, visual, stage, hidden)
    if decided.features is not None:
        where, states = new_states(visual.layout, decided)
        hidden.index_put_(where, states.to(hidden.dtype))
    visual.decided[number] = replace(decided, features=None)


def kwargs_for(
    setup: Setup,
    forward: Forward,
    short: LayerInputs,
    i: int,
    number: int | None,
    kwargs: dict[str, Any],
    hidden: Tensor,
) -> dict[str, Any]:
    """The keyword arguments of a decoder layer that gets a shorter sequence.

    Args:
        setup: The method in the model.
        forward: What is known about the call.
        short: The tokens as the layer gets them.
        i: The layer.
        number: Its number in the cache; None in a recurrent layer.
        kwargs: What the model passes.
        hidden: (B, m, D) the states that enter the layer.
    """
    source = setup.sources.get(i)
    if source is None:
        return short.kwargs(kwargs, hidden, number)
    kind = setup.config.layer_types[i]
    states = kwargs[SHARED_KEYS][kind]
    held = forward.held.get(source)
    if held is None:
        held = LayerInputs(setup, forward.entered, None, forward.whole())
        forward.held[source] = held
    if held.track is short.track:
        return short.kwargs(kwargs, hidden, number, slots=states[0].shape[2])
    shared = copy.copy(kwargs[SHARED_KEYS])
    shared[kind] = states = short.shared(states, held)
    kwargs = {**kwargs, SHARED_KEYS: shared}
    return short.kwargs(kwargs, hidden, number, slots=states[0].shape[2], source=held)


def spare_rows(
    setup: Setup,
    calls: Calls,
    note: Callable[[str], None],
    process: Callable[..., Any],
    hidden: Tensor,
    inputs: Any,
    tables: Any,
    masks: Any,
    wanted: Any,
    **kwargs: Any,
) -> Any:
    """Which tokens enter layers that look at keys of earlier layers (Gemma 3n, Gemma 4)."""
    forward, first = calls.forward, min(setup.sources)
    late = any(stage.layer >= first for stage in setup.inner)
    if late and hidden.shape[1] > 1:
        note(
            f"Layers from {first} on look at keys of earlier ones, and the model itself computes "
            "only the last token there; as this method drops tokens in them, all that are left "
            "were."
        )
    single = forward.asked is not None and forward.asked.single
    if late or single or (forward.left.slots is not None and wanted != 1):
        wanted = 0  # all, as the last tokens of the full sequence may have been dropped
    return process(hidden, inputs, tables, masks, wanted, **kwargs)
