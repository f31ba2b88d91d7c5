"""Stages on the embeddings, and in the tower: the decoder gets a shorter prompt."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pore._compat.arguments import EMBEDS, MASK, POSITIONS
from pore._compat.caches import cache_in, slots_of
from pore._compat.masks import causal_mask, has_masks
from pore.engine.cache import CachedTokens, padding_before
from pore.engine.deepstack import added_to_prompt
from pore.engine.dropping import act, choose, of_those_left, prepare
from pore.engine.entered import Entered
from pore.engine.forward import Came, Left, Visual
from pore.engine.given import chosen_masks, positions_by_axis
from pore.engine.layer_masks import LayerMasks
from pore.engine.masks import own_parts
from pore.engine.records import CacheRecord
from pore.engine.setup import Setup
from pore.engine.stages import Selection
from pore.engine.without_rope import FirstLayer
from pore.errors import InputError
from pore.tensors.gathering import take
from pore.tensors.precision import full_precision
from pore.tensors.selection import check_features


def as_it_came(came: Came, record: CacheRecord, own: Any) -> Entered:
    """How the tokens of a call enter the first layer if none were dropped before it.

    Args:
        came: What the call was given.
        record: What is known of its cache.
        own: Masks of its tokens alone, or None.
    """
    return Entered(
        length=came.length,
        start=record.cached,
        span=record.cached + came.length,
        cached=came.past,
        starts=came.fitting(record.cached),
        masks=came.masks,
        own=own,
        padding=record.padding,
    )


def enter(
    setup: Setup,
    came: Came,
    record: CacheRecord,
    left: Left,
    visual: Visual | None,
    first_layer: FirstLayer | None,
    own: Any,
    kwargs: dict[str, Any],
) -> tuple[dict[str, Any], Entered]:
    """Drop tokens before the first layer.

    Args:
        setup: The method in the model.
        came: What the call was given.
        record: What is known of its cache; brought up to date.
        left: The tokens that are left.
        visual: Their images, or None.
        first_layer: Shows its attention; None where no stage reads it.
        own: Masks of the call's tokens alone, or None.
        kwargs: The decoder's arguments.

    Returns:
        The arguments for a shorter prompt, and how it goes into the first layer.
    """
    embeds: Tensor = kwargs[EMBEDS]
    if visual is not None:
        positions = positions_by_axis(
            kwargs.get(POSITIONS), came.length, record.cached, embeds.device
        )
        embeds = _dropped(setup, left, visual, first_layer, embeds, positions)
    if left.index is None and record.entry is None:
        return {**kwargs, EMBEDS: embeds}, as_it_came(came, record, own)
    counted = _counted(setup, came, record)
    before = record.entry or CachedTokens.unpruned(came.past)
    record.entry = track = _extended(before, came, record, left, embeds)
    if setup.dense and left.index is not None:
        record.padding = padding_before(track.valid)
    entered = Entered(
        length=embeds.shape[1],
        start=record.cached,
        span=record.cached + embeds.shape[1],
        cached=track.valid[:, : -embeds.shape[1]],
        starts=came.fitting(record.cached),
        masks=came.masks,
        own=own,
        padding=record.padding,
    )
    if not setup.dense and setup.narrowest is not None:
        columns = track.columns[:, -embeds.shape[1] :]
        entered = replace(entered, span=record.seen, columns=columns, before=before)
    types = None if visual is None else came.types
    mask, entered = _mask(setup, came, record, left, types, entered, {**kwargs, EMBEDS: embeds})
    given = came.inputs.get(POSITIONS)
    record.last = None
    if isinstance(given, Tensor):
        record.last = take(given, _last_valid(came.tokens)[:, None], -1)
    positions = _positions(setup, came, record, left, kwargs.get(POSITIONS), counted)
    if left.index is not None:
        kwargs = added_to_prompt(setup, visual, kwargs, left.index)
        for name in setup.family.token_inputs:
            if kwargs.get(name) is not None:
                kwargs = {**kwargs, name: take(kwargs[name], left.index, 1)}
    return {**kwargs, EMBEDS: embeds, MASK: mask, POSITIONS: positions}, entered


def _dropped(
    setup: Setup,
    left: Left,
    visual: Visual,
    first_layer: FirstLayer | None,
    embeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """(B, m, D) the embeddings that are left, of those at positions (A, 1 or B, L)."""
    if setup.tower is not None and visual.tower is not None:
        # What the tower has not kept lies there as zeros, up to the number the model expects.
        layout = visual.layout
        features = layout.gather(embeds)
        check_features(features, layout.valid)
        with full_precision():
            held = visual.tower.placed(layout, visual.encoded, features)
            selection = Selection(held.keep, held.features, held.raster, held.structure)
            embeds = choose(left, visual, 0, selection, embeds)
        visual.prefill.projected = visual.layout
    for stage in setup.entry:
        prepare(setup, left, visual, [stage], embeds)
        if first_layer is not None and stage.attention is not None:
            first_layer.read(visual, stage, embeds, of_those_left(left, positions)[0])
        embeds = act(setup, left, visual, stage, embeds)
    return embeds


def _counted(setup: Setup, came: Came, record: CacheRecord) -> Tensor:
    """(B, L) positions counted from the first token that is not padding, dropped ones included."""
    if record.total is None:
        record.total = came.past.sum(-1, keepdim=True).to(came.tokens.device)
    counted = (record.total + came.tokens.cumsum(-1) - 1).clamp(min=0)
    record.total = record.total + came.tokens.sum(-1, keepdim=True)
    return counted + setup.family.first_position


def _extended(
    before: CachedTokens, came: Came, record: CacheRecord, left: Left, embeds: Tensor
) -> CachedTokens:
    """The tokens that the first layer's cache will hold."""
    columns = left.index
    if columns is None:
        columns = torch.arange(came.length, device=embeds.device).expand(len(embeds), -1)
    # A single new token is never padding, and asking would cost a synchronisation.
    full = came.length == 1 or bool(left.tokens.all())
    return before.extended(columns + (record.seen - came.length), left.tokens, full)


# -- positions ------------------------------------------------------------------------------------


def _positions(
    setup: Setup, came: Came, record: CacheRecord, left: Left, given: Any, counted: Tensor
) -> Tensor:
    """Positions of the tokens left.

    Args:
        setup: The method in the model.
        came: What the call was given.
        record: What is known of its cache, these tokens included in `seen` and `entry`.
        left: The tokens that are left.
        given: The positions that the model passes to its decoder, from the caller or its own.
        counted: (B, L) positions counted from the first token.
    """
    of_caller = came.inputs.get(POSITIONS) is not None and isinstance(given, Tensor)
    batch, past = len(came.tokens), record.seen - came.length
    if isinstance(given, Tensor) and given.dim() == 3:
        # Several axes. A plane of text positions in front only serves masks, which are given.
        positions = given[-3:]
        if all(came.inputs.get(name) is None for name in (POSITIONS, MASK)):
            # The model counted the slots of the cache, which lack the dropped tokens.
            positions = positions + (past - record.cached)
    elif setup.dense:
        assert record.entry is not None
        anew = (record.entry.valid.cumsum(-1) - 1).clamp(min=0)[:, -left.tokens.shape[1] :]
        anew = anew + setup.family.first_position
        return anew + _offset(setup, given - counted, came.tokens) if of_caller else anew
    elif of_caller:
        positions = given.expand(batch, -1)
    else:  # as the model itself counts, padding too
        positions = torch.arange(came.length, device=came.tokens.device)[None]
        positions = (positions + past + setup.family.first_position).expand(batch, -1)
    return positions if left.index is None else take(positions, left.index, -1)


def _offset(setup: Setup, offset: Tensor, tokens: Tensor) -> Tensor:
    """(B, 1) the offset of the caller's positions from those counted from the first token."""
    last = offset.expand(len(tokens), -1).gather(1, _last_valid(tokens)[:, None])
    if tokens.shape[1] > 1 and bool(((offset != last) & tokens).any()):
        raise InputError(
            f"{setup.method.name} numbers the tokens that are left anew, which it cannot do if the "
            f"given {POSITIONS} do not count up by one; leave them out, or use a method that "
            "keeps positions."
        )
    return last


def _last_valid(tokens: Tensor) -> Tensor:
    """(B,) the place of the last of (B, n) tokens that is no padding; 0 where all are."""
    return (torch.arange(tokens.shape[1], device=tokens.device) * tokens).amax(1)


# -- masks ----------------------------------------------------------------------------------------


def _mask(
    setup: Setup,
    came: Came,
    record: CacheRecord,
    left: Left,
    types: Tensor | None,
    entered: Entered,
    kwargs: dict[str, Any],
) -> tuple[Any, Entered]:
    """The mask that tells the decoder which tokens of a shortened prompt see each other.

    It is the padding mask alone, with two exceptions: tokens of an image that also see tokens after
    them, and sliding windows, which reach as far as in the full sequence if positions are kept.

    Args:
        setup: The method in the model.
        came: What the call was given.
        record: What is known of its cache.
        left: The tokens that are left.
        types: (B, L) types of the tokens that came, where they make masks.
        entered: How those that are left go into the first layer.
        kwargs: The decoder's arguments, with the embeddings that are left.

    Returns:
        The mask, or one by kind of layer, and `entered` with the masks that later layers need.
    """
    track, cache, embeds = record.entry, cache_in(kwargs), kwargs[EMBEDS]
    assert track is not None
    past, own_columns = record.seen - came.length, track.columns[:, -entered.length :]
    if came.masks is not None:
        masks = chosen_masks(came.masks, own_columns - past, track.columns, track.valid)
        return masks, entered if entered.columns is not None else replace(entered, masks=masks)
    narrowest = setup.narrowest
    if entered.columns is not None and narrowest is not None and record.seen > narrowest:
        whole = Entered(
            length=came.length,
            start=past,
            span=record.seen,
            cached=came.past,
            starts=came.fitting(past),
            own=entered.own,
            padding=record.padding,
        )
        short = LayerMasks(setup, whole, left.index, track)
        masks = short.masks(kwargs.get(MASK), embeds, cache)
        return masks, replace(entered, own=own_parts(masks, entered.length, entered.start))
    if types is None:
        return _padding_mask(setup, track, kwargs.get(MASK), embeds, cache), entered
    types = types.to(embeds.device) if left.index is None else take(types, left.index, -1)
    make = partial(setup.family.masks, setup.model, embeds)
    own = make(left.tokens, None, types) if entered.start else None
    # Cached tokens come before, like text.
    types = nn.functional.pad(types, (entered.start, 0))
    return make(track.valid, cache, types), replace(entered, own=own)


def _padding_mask(setup: Setup, track: CachedTokens, given: Any, embeds: Tensor, cache: Any) -> Any:
    """The mask that tells the decoder which tokens of a shortened prompt are padding."""
    config, length = setup.config, embeds.shape[1]
    if has_masks(config):
        return track.valid.long()
    if given is None and track.full:
        return None
    slots = track.valid.shape[1] if cache is None else slots_of(cache, length, 0)
    left = track.valid[:, -slots:]
    valid = nn.functional.pad(left, (0, slots - left.shape[1]))
    if given is not None:
        return valid.to(given.dtype)
    offset = left.shape[1] - length
    return causal_mask(embeds, valid, config=config, length=length, offset=offset)
