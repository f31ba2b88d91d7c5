"""A stage acts: its rule sees the visual tokens, and those that it drops go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pore.engine.forward import Left, Visual
from pore.engine.setup import Setup
from pore.engine.stages import Selection, Stage, View
from pore.errors import InputError, ModelStateError, ScoreError
from pore.layout import Layout
from pore.tensors.gathering import take
from pore.tensors.padding import letterbox_padding
from pore.tensors.precision import full_precision, scoring
from pore.tensors.selection import check_features
from pore.tower.runs import TowerRuns


def prepare(
    setup: Setup, left: Left, visual: Visual, stages: Sequence[Stage], embeds: Tensor
) -> None:
    """Let stages look at the prompt before they act: at (B, m, D) `embeds`."""
    for stage in stages:
        if stage.prepare is not None and stage.prepare not in visual.memory:
            with scoring():
                made = stage.prepare(view_of(setup, left, visual, stage, embeds))
            visual.memory[stage.prepare] = made


def is_idle(visual: Visual, stage: Stage) -> bool:
    """Whether a stage has nothing to do for this prompt."""
    return stage.idle is not None and stage.idle(visual.memory.get(stage.prepare))


def act(setup: Setup, left: Left, visual: Visual, stage: Stage, hidden: Tensor) -> Tensor:
    """Let a stage drop tokens.

    Args:
        setup: The method in the model.
        left: The tokens of the call that are left.
        visual: Their images.
        stage: The stage.
        hidden: (B, m, D) the states that enter its layer.

    Returns:
        (B, k, D) the states of those that stay.
    """
    selection = decide(setup, left, visual, stage, hidden)
    return choose(left, visual, stage.layer, selection, hidden)


def decide(setup: Setup, left: Left, visual: Visual, stage: Stage, hidden: Tensor) -> Selection:
    """What a stage's rule decides, given what `act` is.

    Raises:
        ModelStateError: It decides more than the stage asked for.
    """
    with full_precision() if stage.merges else scoring():
        selection = stage.rule(view_of(setup, left, visual, stage, hidden))
    if selection.features is not None and not stage.merges:
        raise ModelStateError(
            f"{setup.method.name} gives new states to tokens that stay, without saying so; make "
            "its stage with merges=True."
        )
    if selection.sizes is not None and not stage.proportional:
        raise ModelStateError(
            f"{setup.method.name} says how often attention is to count tokens, without asking for "
            "it; make its stage with proportional=True."
        )
    visual.misplaced |= selection.features is not None and not stage.in_place
    return selection


def new_states(layout: Layout, selection: Selection) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Where a selection has new states, and which."""
    assert selection.features is not None
    rows = layout.rows[:, None].expand_as(layout.columns)[selection.keep]
    return (rows, layout.columns[selection.keep]), selection.features[selection.keep]


def choose(left: Left, visual: Visual, layer: int, selection: Selection, hidden: Tensor) -> Tensor:
    """Drop what a selection does not keep, and note it for the report.

    Args:
        left: The tokens of the call that are left.
        visual: Their images.
        layer: The first layer that sees fewer tokens.
        selection: What stays.
        hidden: (B, m, D) the states.

    Returns:
        (B, k, D) the states of what stays.
    """
    layout = visual.layout
    if selection.features is not None:
        where, states = new_states(layout, selection)
        hidden = hidden.index_put(where, states.to(hidden.dtype))
    if selection.sizes is not None:
        sizes, own = left.sizes, selection.sizes
        sizes = torch.ones_like(left.tokens, dtype=own.dtype) if sizes is None else sizes
        rows = layout.rows[:, None].expand_as(layout.columns)[selection.keep]
        where = rows.to(sizes.device), layout.columns[selection.keep].to(sizes.device)
        left.sizes = sizes.index_put(where, own[selection.keep].to(sizes))
    if selection.raster is not None:
        layout = replace(layout, raster=selection.raster)
    kept = layout.kept_tokens(selection.keep)
    for image, stays in zip(layout.images, selection.structure or (), strict=False):
        if not stays:
            kept[image.row, list(image.structure)] = False
    if selection.others is not None:
        kept = kept & ~selection.others
    if not torch.equal(kept, layout.tokens):
        index = left.drop(kept)
        hidden = take(hidden, index, 1)
        visual.earlier = {i: take(states, index, 1) for i, states in visual.earlier.items()}
        layout = layout.shorten(selection.keep, index, left.tokens)
    visual.layout = layout
    visual.prefill.steps.append((layer, layout))
    return hidden


def view_of(setup: Setup, left: Left, visual: Visual, stage: Stage, hidden: Tensor) -> View:
    """What a stage's rule, or its `prepare`, sees of (B, m, D) states.

    Raises:
        ScoreError: States or attention hold NaN or infinity.
    """
    visual.layout = layout = visual.layout.to(hidden.device)
    check_features(layout.gather(hidden), layout.valid)
    attention = visual.attention if stage.attention is not None else None
    if isinstance(attention, Tensor):
        if attention.is_floating_point() and not bool(torch.isfinite(attention).all()):
            raise ScoreError(
                f"Attention of decoder layer {stage.reads_layer} holds NaN or infinity; look "
                "for overflow (fp16 where the model needs bf16?), damaged weights or bad "
                "inputs."
            )
        attention = attention.to(hidden.device)
    tower, padding, encoded = visual.tower, None, None
    if tower is not None and stage.padding:
        padding = _letterbox(tower, visual).to(hidden.device)
    if tower is not None and stage.tower:
        encoded = tower.encoded(visual.layout, visual.encoded)
    return View(
        layout=layout,
        hidden_states=hidden,
        attention=attention,
        padding=padding,
        generator=setup.generator,
        norm=setup.family.norm(setup.model),
        memory=visual.memory.get(stage.prepare),
        input_ids=left.ids,
        tower=encoded,
        positions=None if visual.positions is None else of_those_left(left, visual.positions),
        rotary=partial(setup.family.rotary, setup.model, layer=max(stage.layer - 1, 0)),
        dense=setup.renumbers(stage),
        correction=stage.correction,
        beside=visual.beside,
        bias_at=stage.bias_at,
        earlier=_earlier(visual, stage, hidden),
        sizes=None if left.sizes is None else layout.gather(left.sizes).to(hidden.device),
    )


def _earlier(visual: Visual, stage: Stage, hidden: Tensor) -> Tensor | None:
    """(B, m, D) what entered the layer that a stage looks back at."""
    states = None if stage.earlier is None else visual.earlier.get(stage.earlier)
    return None if states is None else states.to(hidden.device)


def of_those_left(left: Left, positions: Tensor) -> Tensor:
    """(A, B, m) the positions of the tokens that are left, of positions (A, 1 or B, L)."""
    if left.index is None:
        return positions.expand(-1, len(left.tokens), -1)
    return take(positions, left.index, -1)


def _letterbox(tower: TowerRuns, visual: Visual) -> Tensor:
    """(I, t) the share of every token's patch that is letterbox padding; 1 at filling."""
    layout = visual.layout
    grid = layout.images[0].grid
    if grid is None or any(image.grid != grid for image in layout.images):
        raise InputError("Visual tokens without a grid cannot be matched with padding.")
    pixels = tower.pictures(visual.encoded)
    raster, valid = (x.to(pixels.device) for x in (layout.raster, layout.valid))
    shares = letterbox_padding(pixels, grid).gather(1, raster.clamp(min=0))
    return shares.masked_fill(raster < 0, 0.0).masked_fill(~valid, 1.0)
