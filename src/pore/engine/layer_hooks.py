"""The hooks on the decoder's layers, and on the norm after the last."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from pore._compat.arguments import HIDDEN
from pore._compat.attention import layer_number
from pore._compat.checkpointing import CHECKPOINT, before_checkpoint, checkpointed
from pore._compat.models import before_mlp
from pore.changes import Changes
from pore.engine.calls import Calls, alone
from pore.engine.layers import decide_before_mlp, kwargs_for, pass_stage, pass_start
from pore.engine.probing import look_ahead
from pore.engine.setup import Setup
from pore.errors import ModelStateError

LayerHook = Callable[
    ["nn.Module | None", tuple[Any, ...], dict[str, Any]],
    "tuple[tuple[Any, ...], dict[str, Any]] | None",
]
"""A pre-hook: called with a layer and its input; returns another input, or None.

If the layer's states are checkpointed, it has acted before the layer, and does nothing here."""


def hook_layers(changes: Changes, setup: Setup, calls: Calls) -> Callable[[], None]:
    """Hook the layers from the first that may get something else, and the norm.

    Args:
        changes: What takes the hooks off.
        setup: The method in the model.
        calls: Its calls.

    Returns:
        What is to be called before the decoder runs.
    """
    looked = [stage.earlier for stage in setup.inner if stage.earlier is not None]
    first = min([setup.first, *looked])
    hooks = {i: _layer_hook(setup, calls, i) for i in range(first, len(setup.layers))}
    for i, hook in hooks.items():
        changes.before(setup.layers[i], hook, with_kwargs=True)
    for number, stage in enumerate(setup.inner):
        if stage.before_mlp:
            _hook_before_mlp(changes, setup, calls, number)
    last = [number for number, stage in enumerate(setup.inner) if stage.layer == len(setup.layers)]
    if last:

        def before_norm(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, *others = args
            for number in last:
                hidden = pass_stage(setup, calls.forward, number, hidden)
            return (hidden, *others)

        changes.before(setup.family.norm(setup.model), before_norm)
    hooked = [(setup.layers[i], hook) for i, hook in hooks.items()]
    return partial(_act_before_checkpoints, changes, hooked, [])


def _hook_before_mlp(changes: Changes, setup: Setup, calls: Calls, number: int) -> None:
    """Hook what a layer calls between its attention and its MLP, for a stage that acts there."""
    layer = setup.layers[setup.inner[number].layer - 1]
    norm = before_mlp(layer)
    assert norm is not None

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        if layer.training and checkpointed(layer):
            raise ModelStateError(
                f"{setup.method.name} acts inside decoder layers, whose states gradient "
                "checkpointing does not keep; switch it off, or use a method that acts between "
                "layers."
            )
        if calls.forward.ahead is None:
            decide_before_mlp(setup, calls.forward, number, args[0])

    changes.before(norm, before)


def _layer_hook(setup: Setup, calls: Calls, i: int) -> LayerHook:
    family, layer = setup.family, setup.layers[i]
    number = None if family.recurrent(layer) else layer_number(family.attention(layer))
    stages = [(n, stage.ahead) for n, stage in enumerate(setup.inner) if stage.layer == i]
    named = family.token_inputs
    names = list(inspect.signature(layer.forward).parameters) if named else []
    looked_at = any(stage.earlier == i for stage in setup.inner)
    starts = i == 0 and setup.forgets
    is_source, has_source = i in setup.sources.values(), i in setup.sources

    def before(
        layer: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if layer is not None and layer.training and checkpointed(layer):
            return None
        call = calls.inside
        forward = None if call is None else call.forward
        if forward is None:
            raise alone()
        if forward.ahead is not None:  # it runs only to be read
            return None
        if named:
            args, kwargs = args[:1], {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
        hidden = args[0] if args else kwargs[HIDDEN]
        if starts:
            pass_start(setup, forward)
        for n, ahead in stages:
            if ahead and forward.visual is not None:
                look_ahead(setup, forward, n, hidden, args, kwargs)
            hidden = pass_stage(setup, forward, n, hidden)
        if looked_at and forward.visual is not None:
            forward.visual.earlier[i] = hidden.detach()
        short = forward.short
        if is_source:
            forward.held[i] = short
        if short is None:
            return None
        if has_source:
            kwargs = kwargs_for(setup, forward, short, i, number, kwargs, hidden)
        else:
            kwargs = short.kwargs(kwargs, hidden, number)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, HIDDEN: hidden}

    return before


def _act_before_checkpoints(
    changes: Changes, hooked: list[tuple[nn.Module, LayerHook]], made: list[Callable[..., Any]]
) -> None:
    """Let layers drop tokens before what is computed again in the backward.

    In the backward the prompt is no longer known, and the block may have ended.

    Args:
        changes: What takes this back.
        hooked: The layers with hooks.
        made: What was put into layers so far.
    """
    for layer, hook in hooked:
        if layer.training and checkpointed(layer):
            checkpoint: Any = getattr(layer, CHECKPOINT)
            if checkpoint not in made:
                checkpoint = before_checkpoint(partial(hook, None), checkpoint)
                made.append(checkpoint)
                changes.put(layer, CHECKPOINT, checkpoint)
