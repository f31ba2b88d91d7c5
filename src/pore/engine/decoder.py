"""Before and after the decoder: a call's tokens go in, and its cache and output come out."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pore._compat.arguments import EMBEDS, IDS, MASK, POSITIONS, WANTED
from pore._compat.caches import cache_in, has_static_slots
from pore.engine.book import CacheBook
from pore.engine.cache import padding_before
from pore.engine.calls import Calls
from pore.engine.dropping import prepare
from pore.engine.entry import as_it_came, enter
from pore.engine.forward import Came, Forward, Left, Visual
from pore.engine.given import check_unpacked, custom_masks, positions_by_axis
from pore.engine.images import Images, placed
from pore.engine.limits import check_query
from pore.engine.masks import check_own_slot, own_slots, token_mask
from pore.engine.prefill import Prefill
from pore.engine.records import START, CacheRecord
from pore.engine.setup import Setup
from pore.engine.without_rope import FirstLayer
from pore.layout import Image
from pore.tensors.gathering import take
from pore.tower.runs import TowerRuns


def arrive(
    setup: Setup,
    book: CacheBook,
    images: Images,
    tower: TowerRuns | None,
    first_layer: FirstLayer | None,
    calls: Calls,
    inputs: dict[str, Any],
    kwargs: dict[str, Any],
) -> tuple[Forward, dict[str, Any]]:
    """Handle a call's tokens before they enter the decoder.

    Args:
        setup: The method in the model.
        book: Knows the caches.
        images: Finds the call's images.
        tower: What the vision tower saw last; None where the method does not read it.
        first_layer: Shows its attention; None where no stage on the embeddings reads it.
        calls: The calls of the model.
        inputs: Arguments of the multimodal model in this one, by name.
        kwargs: The decoder's arguments.

    Returns:
        What is known about the call from here on, and the decoder's arguments for the tokens left.
    """
    embeds, cache = kwargs[EMBEDS], cache_in(kwargs)
    batch, length = embeds.shape[:2]
    record = book.record(cache, batch, length)
    found, record.marked = images.find(inputs, embeds, record)
    # Of single tokens only the first is checked, because the check waits for the device.
    looks = length > 1 or not record.checked
    if looks:
        book.check_goes_on(record, inputs, length)
    came = _came(setup, record, inputs, embeds, cache, bool(found), calls.makes_masks())
    if record.padding is None:
        record.padding = padding_before(came.every)
    left, visual, own = Left(came.tokens, inputs.get(IDS), False), None, None
    if found:
        check_unpacked(inputs, cache is not None)
        visual = _visual(setup, found, left, embeds, tower)
    if visual is not None and came.types is not None and record.seen:
        own = setup.family.masks(setup.model, embeds, came.tokens, None, came.types)
    prefill = None if visual is None else visual.prefill
    if visual is None and record.seen == 0:  # no new token, further turn or assistant's draft
        prefill = Prefill(came.tokens)
    if looks:
        tracks = record.tracks
        first = 0 if START in tracks else min((setup.inner[n].layer for n in tracks), default=0)
        if any(window is not None for window in setup.windows[:first]):
            check_own_slot(kwargs.get(MASK), cache, length)
        record.checked = record.checked or length == 1
    record.seen += length
    if setup.shortens_prompt:
        kwargs, entered = enter(setup, came, record, left, visual, first_layer, own, kwargs)
    else:
        entered = as_it_came(came, record, own)
    if visual is not None:
        prepare(setup, left, visual, setup.inner, kwargs[EMBEDS])
        visual.positions = positions_by_axis(
            kwargs.get(POSITIONS), entered.length, entered.start, embeds.device
        )
    left.enter()
    record.cached += entered.length
    return Forward(record, came, left, visual, entered, prefill, calls.asked), kwargs


def _came(
    setup: Setup,
    record: CacheRecord,
    inputs: dict[str, Any],
    embeds: Tensor,
    cache: Any,
    has_images: bool,
    makes_masks: bool,
) -> Came:
    """What a call was given."""
    (batch, length), mask = embeds.shape[:2], inputs.get(MASK)
    made = makes_masks or has_static_slots(cache)
    masks = custom_masks(mask, record.seen, length, made)
    starts = (0, 0)
    if record.seen and length > 1:
        starts = own_slots(cache, sliding=False), own_slots(cache, sliding=True)
    start = starts[0] if masks is None else record.seen
    padding = None if has_images or record.entry is None else record.padding
    # Reading the mask of a single new token would cost a synchronisation and tells nothing.
    mask = mask if has_images or length > 1 else None
    tokens = token_mask(mask, batch, record.seen, length, embeds.device, start, padding)
    name = setup.family.token_types
    types = None if name is None else inputs.get(name)
    return Came(
        inputs=inputs,
        length=length,
        every=tokens,
        tokens=tokens[:, record.seen :],
        past=tokens[:, : record.seen],
        starts=starts,
        masks=masks,
        types=None if types is None else types[:, -length:],
    )


def _visual(
    setup: Setup, images: list[Image], left: Left, embeds: Tensor, tower: TowerRuns | None
) -> Visual | None:
    """The images of a call; None where the attention mask hides them all."""
    layout, encoded = placed(setup, images, left.tokens, embeds, tower)
    if layout is None:
        return None
    if setup.inner:
        check_query(layout)
    left.right = not bool(left.tokens[:, -1].all())
    prefill = Prefill(left.tokens, layout)
    if tower is not None:
        prefill.tower_tokens = list(tower.block_tokens)
    return Visual(layout, prefill, tower, encoded)


def leave(book: CacheBook, forward: Forward, kwargs: dict[str, Any], output: Any) -> None:
    """Handle a call's output after the decoder.

    Args:
        book: Knows the caches.
        forward: What is known about the call.
        kwargs: The decoder's arguments.
        output: Its output, cut down here to what the caller asks for.
    """
    if forward.visual is not None:
        forward.record.forget()
    cache = cache_in(kwargs)
    if cache is None:  # made by the model where the caller gave none
        cache = cache_in(output)
    if cache is not None:
        book.keep(cache, forward.record)
    rows, wanted, asked = None, kwargs.get(WANTED), forward.asked
    if asked is not None:
        asked.prefill = forward.prefill
        asked.note_left(forward.left.slots, forward.left.tokens)
        rows = asked.rows(forward.came.tokens)
    if rows is not None:
        output.last_hidden_state = take(output.last_hidden_state, rows, 1)
    elif isinstance(wanted, int) and wanted > 0:
        # A model that leaves this to its decoder takes fewer tokens for those it asked for.
        output.last_hidden_state = output.last_hidden_state[:, -wanted:]
