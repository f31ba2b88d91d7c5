"""Shortening a running decoder: hidden states, RoPE, positions, masks and what the cache holds.

Nothing is derived anew that the model has already made: masks and rotary tables of the short
sequence are those of the long one, taken at the kept positions. So padding, sliding windows and
bidirectional image blocks stay what the model means by them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pore._private import (
    MASK,
    POSITIONS,
    ROTARY,
    cache_in,
    causal_mask,
    has_masks,
    layer_number,
    sliding_layers,
    slots_of,
    uses_flash,
)
from pore.errors import ModelStateError, UnsupportedModelError
from pore.given import chosen_masks


def pack(kept: Tensor, right: bool) -> tuple[Tensor, Tensor]:
    """Choose the positions that a shortened batch keeps, filled up to a common length.

    Args:
        kept: (B, L) bool, True at the tokens that stay.
        right: Whether shorter rows are filled on the right, as a batch that is padded there; on the
            left the last token of every sample stays last.

    Returns:
        index (B, M), the old position of every new one, ascending among the kept; and
        valid (B, M) bool, False at filling.
    """
    counts = kept.sum(-1)
    length = int(counts.max())
    order = (~kept if right else kept).long().argsort(dim=-1, stable=True)
    index = order[:, :length] if right else order[:, order.shape[1] - length :]
    slots = torch.arange(length, device=kept.device)
    valid = slots < counts[:, None] if right else slots >= length - counts[:, None]
    return index, valid


def take(states: Tensor, index: Tensor, dim: int) -> Tensor:
    """Take positions along one dimension of a tensor whose batch may be broadcast.

    Args:
        states: (..., B or 1, ..., L, ...) with the batch in the dimension before or at the front.
        index: (B, M) positions, for each sample.
        dim: Dimension of length L; the batch is dimension 0, or 1 where a leading dimension holds
            the planes of a multi-dimensional rotary embedding.

    Returns:
        The states at the positions, with the batch expanded to B.
    """
    index = index.to(states.device)
    dim = dim % states.dim()
    batch_dim = dim - 1
    sizes = list(states.shape)
    sizes[batch_dim] = index.shape[0]
    states = states.expand(sizes)
    shape = [1] * states.dim()
    shape[batch_dim], shape[dim] = index.shape
    sizes[dim] = index.shape[1]
    return states.gather(dim, index.view(shape).expand(sizes))


def window_of(config: Any, layer: int) -> int | None:
    """The sliding window of a decoder layer, or the size of its chunks.

    Args:
        config: The decoder's config.
        layer: The layer, from 0.

    Returns:
        How many tokens a token looks at at most, itself and those before it; None where it looks
        at all.
    """
    kinds = getattr(config, "layer_types", None)
    if _chunked(config, layer):
        chunk: int | None = config.attention_chunk_size
        return chunk
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def _chunked(config: Any, layer: int) -> bool:
    """Whether tokens look as far as where their chunk of the sequence starts (Llama 4)."""
    kinds = getattr(config, "layer_types", None)
    return kinds is not None and kinds[layer] == "chunked_attention"


def _far(query: Tensor, key: Tensor, window: int, first: Tensor | None) -> Tensor:
    """Which keys are out of a window.

    Args:
        query: Positions in the full sequence, and `key`, those of the keys.
        key: See `query`.
        window: Its size.
        first: Where the sequence starts behind its padding, for chunks of that size; None where
            the window slides.
    """
    if first is None:
        return query - key >= window
    return (query - first) // window != (key - first) // window


def of_layer(masks: Any, config: Any, layer: int) -> Any:
    """The mask of a layer.

    Args:
        masks: What a decoder takes: a mask, or one by kind of layer.
        config: The decoder's config.
        layer: The layer, from 0.
    """
    return masks[config.layer_types[layer]] if isinstance(masks, Mapping) else masks


def own_slots(cache: Any, sliding: bool) -> int:
    """Where the tokens of a forward start among the slots that the model makes masks for.

    Masks of a kind are made for the first layer of that kind in the cache.

    Args:
        cache: The cache before the forward, or None.
        sliding: Whether the mask is that of layers with a sliding window.

    Returns:
        The number of slots before, unless the cache has let go of some since.
    """
    if cache is None:
        return 0
    kinds = sliding_layers(cache)
    return int(cache.get_seq_length(kinds.index(sliding) if sliding in kinds else 0))


def check_own_slot(masks: Any, cache: Any, length: int) -> None:
    """Refuse masks in which layers with a sliding window do not show a decoded token itself.

    Of several tokens, masks that are narrower than what these layers hold.

    transformers 5.16 makes them, for Gemma 3 and a static cache or a token with its type, for the
    first layer without one, which may hold fewer tokens.

    Args:
        masks: What the decoder is given: one by kind of layer, or anything else.
        cache: The cache before the forward.
        length: Tokens of the forward.

    Raises:
        UnsupportedModelError: They do not.
    """
    mask = masks.get("sliding_attention") if isinstance(masks, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return
    slot, kinds = own_slots(cache, sliding=True), sliding_layers(cache)
    if length == 1 and slot < mask.shape[-1]:
        seen = mask[..., -1, slot]
        right = bool((seen if seen.dtype == torch.bool else seen > -1e4).all())
    else:  # or a cache has let go of what is out of the window
        right = True not in kinds or mask.shape[-1] >= slots_of(cache, length, kinds.index(True))
    if not right:
        raise UnsupportedModelError(
            "This version of transformers makes the masks of layers with a sliding window for a "
            "layer that holds fewer tokens; use a dynamic cache without marks of what tokens are, "
            "a method that acts on the embeddings, or transformers 5.20 or newer."
        )


def own_part(mask: Tensor, length: int, start: int) -> Tensor:
    """The columns of a mask for the tokens of the forward that it was made for.

    Args:
        mask: (B, H, length, n) mask.
        length: Tokens of the forward.
        start: Slots before them, of which the cache may have let go of some.

    Returns:
        (B, H, length, length) part of the mask.
    """
    start = min(start, mask.shape[-1] - length)
    return mask[..., start : start + length]


def own_parts(masks: Any, length: int, start: int) -> Any:
    """`own_part` of what a decoder takes: of a mask, or of one by kind of layer.

    Only 4-D masks say more than which tokens are padding; None stands for the others.
    """
    if isinstance(masks, Mapping):
        return {kind: own_parts(mask, length, start) for kind, mask in masks.items()}
    is_full = isinstance(masks, Tensor) and masks.dim() == 4
    return own_part(masks, length, start) if is_full else None


class Track:
    """What the layers from one stage on hold in the cache, in positions of the full sequence.

    Attributes:
        columns: (B, M) the position in the full sequence of every slot of the cache.
        valid: (B, M) bool, False at filling.
        full: Whether all slots are valid.
    """

    def __init__(self, columns: Tensor, valid: Tensor, full: bool) -> None:
        self.columns = columns
        self.valid = valid
        self.full = full

    @classmethod
    def unpruned(cls, tokens: Tensor) -> Track:
        """The track of a sequence that nothing was dropped from.

        Args:
            tokens: (B, n) bool, False at padding.
        """
        columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return cls(columns, tokens, bool(tokens.all()))

    def extended(self, columns: Tensor, valid: Tensor, full: bool) -> Track:
        """This track with further slots.

        Args:
            columns: (B, m) positions of the new slots in the full sequence.
            valid: (B, m) bool.
            full: Whether all new slots are valid.
        """
        device = self.columns.device
        return Track(
            torch.cat([self.columns, columns.to(device)], 1),
            torch.cat([self.valid, valid.to(device)], 1),
            self.full and full,
        )

    def places(self, other: Track, span: int) -> Tensor:
        """(B, m) where the slots of a track that kept some of these are among these.

        Args:
            other: That track.
            span: Tokens of the full sequence.
        """
        columns = self.columns.to(other.columns.device)
        slots = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
        where = columns.new_zeros(len(columns), span).scatter_(1, columns, slots)
        return where.gather(1, other.columns)

    def cropped(self, count: int) -> Track:
        """This track without its last `count` slots.

        Assisted decoding takes rejected tokens back from the end of the cache.
        """
        length = max(self.columns.shape[1] - count, 0)
        return Track(self.columns[:, :length], self.valid[:, :length], self.full)


class Shortened:
    """One forward's tokens as the layers from one stage on get them.

    Args:
        index: (B, m) positions kept, in the chunk that entered the decoder; None keeps all.
        track: What these layers' cache holds, this chunk included.
        length: Tokens of this chunk that the layers see (m).
        chunk: Tokens of this chunk that entered the decoder.
        span: Tokens of the full sequence so far, this chunk included.
        config: The decoder's config.
        starts: Where the chunk starts in the masks that the model makes, of layers without and
            with a sliding window; None where they do not fit a cache that lacks tokens.
        padding: (B,) padding at the front of the full sequence.
        custom: The caller's masks over the full sequence, in place of all others.
        own: Masks of the chunk alone, as a decoder takes them, to be used in place of those; None
            for nothing more than that a token sees those before it.
        rotary: Makes rotary tables for states (B, m, D) at positions (B, m) for a layer, where the
            tokens are numbered anew; None where they keep their positions.
        first_position: Where they are numbered from.
    """

    def __init__(
        self,
        index: Tensor | None,
        track: Track,
        *,
        length: int,
        chunk: int,
        span: int,
        config: Any,
        starts: tuple[int | None, int | None] = (0, 0),
        padding: Tensor | None = None,
        own: Any = None,
        custom: Any = None,
        rotary: Callable[..., Any] | None = None,
        first_position: int = 0,
    ) -> None:
        self.index = index
        self.track = track
        self.length = length
        self.chunk = chunk
        self.span = span
        self._config = config
        self._starts = starts
        self._padding = padding
        self._own = own
        self._custom = custom
        self._rotary = rotary
        self._first_position = first_position
        self._made: dict[tuple[Any, ...], Any] = {}

    def shared(self, states: tuple[Tensor, Tensor], source: Shortened) -> tuple[Tensor, Tensor]:
        """Keys and values of an earlier layer, of the tokens that these layers have.

        Args:
            states: Its keys and values (B, G, n, d), those in the cache first.
            source: What that layer got.

        Returns:
            The two for the slots of this track.
        """

        def left(states: tuple[Tensor, Tensor], _: Tensor) -> tuple[Tensor, Tensor]:
            places = source.track.places(self.track, self.span).to(states[0].device)
            # A cache lets go of what is out of a sliding window, which no mask shows.
            gone = max(source.track.columns.shape[1] - states[0].shape[2], 0)
            index = (places - gone).clamp(min=0)[:, None, :, None]
            keys, values = (
                x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in states
            )
            return keys, values

        found: tuple[Tensor, Tensor] = self._memo(states, states[0], left)
        return found

    def kwargs(
        self,
        kwargs: dict[str, Any],
        hidden: Tensor,
        attention: nn.Module | None,
        *,
        token_inputs: Sequence[str] = (),
        slots: int | None = None,
        source: Shortened | None = None,
    ) -> dict[str, Any]:
        """The keyword arguments of a decoder layer for the short sequence.

        Args:
            kwargs: What the model passes to the layer.
            hidden: (B, m, D) the hidden states that enter the layer; of the last tokens alone where
                the model has let go of the others.
            attention: The layer's attention module; None in a recurrent layer.
            token_inputs: Further arguments with an entry for every token.
            slots: Keys that its kernel gets, where they are those of an earlier layer.
            source: What that layer got, where more tokens were there; they are numbered as there.

        Returns:
            A copy with mask, positions and rotary embedding shortened; the same object where
            nothing is to be changed, as for most decoded tokens.
        """
        layer = 0 if attention is None else layer_number(attention)
        unmasked = self.track.full and self._window(layer) is None
        unmasked = unmasked and kwargs.get(MASK) is None and self._custom is None
        rotary = self._rotary if source is None else source._rotary
        if self.index is None and rotary is None and unmasked:
            return kwargs
        kwargs = dict(kwargs)
        whole = hidden.shape[1] == self.length
        if self.index is not None and whole:
            for name in token_inputs:
                if kwargs.get(name) is not None:
                    kwargs[name] = take(kwargs[name], self.index, 1)
        if rotary is not None:
            # Layers with and without a window may have rotary tables of their own.
            make, kind = partial(self._numbered_anew, layer, source), window_of(self._config, layer)
            tables, positions = self._memo(rotary, hidden, make, kind, id(source), whole)
            kwargs.update({ROTARY: tables, POSITIONS: positions})
        elif self.index is not None and whole:
            for name in (ROTARY, POSITIONS):
                if kwargs.get(name) is not None:
                    kwargs[name] = self._memo(kwargs[name], hidden, self._positions)
        if attention is None:
            kwargs[MASK] = self._memo(self.track, hidden, self._present)
            return kwargs
        kwargs[MASK] = self.mask(kwargs.get(MASK), hidden, cache_in(kwargs), layer, slots)
        return kwargs

    def masks(self, given: Any, hidden: Tensor, cache: Any) -> Any:
        """The masks of all layers for the short sequence, as a decoder takes them.

        Args:
            given: What the model made for the full sequence: a mask, or one by kind of layer.
            hidden: (B, m, D) the states of the short one.
            cache: The cache, or None.
        """
        kinds = getattr(self._config, "layer_types", None)
        if kinds is None:
            return self.mask(given, hidden, cache, 0)
        first = {kind: kinds.index(kind) for kind in kinds}
        return {
            kind: self.mask(of_layer(given, self._config, layer), hidden, cache, layer)
            for kind, layer in first.items()
        }

    def mask(
        self, given: Any, hidden: Tensor, cache: Any, layer: int, slots: int | None = None
    ) -> Any:
        """The mask of a layer for the short sequence.

        Args:
            given: The mask that the model made for the full sequence, or None.
            hidden: (B, m, D) the states that enter the layer.
            cache: The cache, or None.
            layer: The layer, from 0.
            slots: Keys that its kernel gets; None where they are those of its cache.
        """
        if slots is None and cache is not None:
            slots = slots_of(cache, self.length, layer)
        elif slots is None:
            slots = self.track.columns.shape[1]
        masks = of_layer(self._custom, self._config, layer)
        if masks is not None:
            return self._memo(masks, hidden, partial(self._chosen, slots=slots), slots)
        window, sliding = self._window(layer), window_of(self._config, layer) is not None
        start, lost = self._starts[sliding], False
        if self._own is not None or (start is None and self.chunk > 1):
            given = of_layer(self._own, self._config, layer)
            start, lost = 0, given is None and self.track.columns.shape[1] > self.length > 1
        first = None
        if _chunked(self._config, layer) and self._padding is not None:
            first = self._padding.to(hidden.device)
        make = partial(
            self._mask, slots=slots, window=window, first=first, start=start or 0, lost=lost
        )
        return self._memo(given, hidden, make, slots, window, lost, hidden.shape[1])

    def _chosen(self, masks: Any, hidden: Tensor, *, slots: int) -> Any:
        """The caller's mask at what is left."""
        columns = self.track.columns
        rows = columns[:, -hidden.shape[1] :] - (self.span - self.chunk)
        mask = chosen_masks(masks, rows, columns, self.track.valid)[..., -slots:]
        closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return nn.functional.pad(mask, (0, slots - mask.shape[-1]), value=closed)

    def _window(self, layer: int) -> int | None:
        """A layer's sliding window, unless it reaches everything."""
        window = window_of(self._config, layer)
        return None if window is None or self.span <= window else window

    def _memo(self, value: Any, hidden: Tensor, make: Any, *key: Any) -> Any:
        # Layers are given the same few objects: each is shortened once per device.
        name = (id(value), hidden.device, *key)
        if name not in self._made:
            # `value` is held too, so that no other object gets its id.
            self._made[name] = (value, make(value, hidden))
        return self._made[name][1]

    def _numbered_anew(
        self, layer: int, source: Shortened | None, rotary: Any, hidden: Tensor
    ) -> tuple[Any, Tensor]:
        track = self.track if source is None else source.track
        positions = (track.valid.cumsum(-1) - 1).clamp(min=0)
        if source is not None:
            places = track.places(self.track, self.span)
            positions = positions.gather(1, places.to(positions.device))
        positions = positions[:, -hidden.shape[1] :].to(hidden.device) + self._first_position
        return rotary(hidden, positions, layer), positions

    def _positions(self, value: Any, hidden: Tensor) -> Any:
        assert self.index is not None
        if isinstance(value, (tuple, list)):
            return tuple(take(table, self.index, -2) for table in value)
        # Rotary tables of complex numbers come alone.
        return take(value, self.index, -2 if value.is_complex() else -1)

    def _present(self, track: Track, hidden: Tensor) -> Tensor | None:
        """(B, m) which tokens of this chunk are no filling, for a layer that looks at no others."""
        if track.full or self.length == 1:
            return None
        return track.valid[:, -self.length :].to(hidden.device)

    def _mask(
        self,
        mask: Any,
        hidden: Tensor,
        *,
        slots: int,
        window: int | None,
        first: Tensor | None,
        start: int,
        lost: bool,
    ) -> Any:
        """The mask of a layer whose kernel gets `slots` keys.

        What the tokens of this forward see of each other is what the model says. What is in the
        cache they see, as far as a window reaches in the full sequence. Where the mask is `lost`,
        None does not say that kernels need none.
        """
        if mask is None and self.track.full and window is None and not lost:
            return None  # purely causal, and an ascending choice of positions still is
        columns, valid = (x.to(hidden.device) for x in (self.track.columns, self.track.valid))
        if isinstance(mask, Tensor) and mask.dim() == 2 and not has_masks(self._config):
            left = valid[:, -slots:]  # for a kernel of the user's own, as the caller gives it
            return nn.functional.pad(left, (0, slots - left.shape[1])).to(mask.dtype)
        if self.chunk > 1 and hasattr(mask, "mask_mod"):  # FlexAttention's
            inside = self._inside(mask, start, hidden.device)
            return self._causal(hidden, columns, valid, slots, window, first, inside)
        if self.chunk == 1 or not isinstance(mask, Tensor) or mask.dim() != 4:
            return self._causal(hidden, columns, valid, slots, window, first)
        rows = hidden.shape[1]
        mask = own_part(mask, self.chunk, start).expand(columns.shape[0], -1, -1, -1)
        whole = mask.shape[-2] == self.chunk  # or the model has taken the last rows
        if self.index is None and whole:
            mask = mask[..., -rows:, :]
        elif self.index is not None:
            if whole:
                mask = take(mask.transpose(0, 1), self.index[:, -rows:], -2).transpose(0, 1)
            index = self.index.to(mask.device)[:, None, None]
            mask = mask.gather(-1, index.expand(-1, *mask.shape[1:3], -1))
        closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        opened = True if mask.dtype == torch.bool else 0.0
        own, past = self.length, columns.shape[1] - self.length
        mask = nn.functional.pad(mask, (past, 0), value=opened)
        if not self.track.full:
            mask = mask.masked_fill(~valid[:, None, None], closed)
        if window is not None:
            where = None if first is None else first[:, None, None]
            far = _far(columns[:, -rows:, None], columns[:, None, :past], window, where)
            far = nn.functional.pad(far, (0, own))
            mask = mask.masked_fill(far[:, None], closed)
        mask = mask[..., -slots:]  # a cache lets go of what no later token can see
        return nn.functional.pad(mask, (0, slots - mask.shape[-1]), value=closed)

    def _causal(
        self,
        hidden: Tensor,
        columns: Tensor,
        valid: Tensor,
        slots: int,
        window: int | None,
        first: Tensor | None,
        inside: Callable[[Any, Any, Any, Any], Any] | None = None,
    ) -> Any:
        """A mask made anew: tokens of this forward see what is `inside`, or those before them."""
        columns, valid = columns[:, -slots:], valid[:, -slots:]
        used = valid.shape[1]
        past = used - self.length
        valid = nn.functional.pad(valid, (0, slots - used))
        columns = nn.functional.pad(columns, (0, slots - used))
        if window is not None and uses_flash(self._config):
            valid, window = valid & self._near(columns, used, window, first), None

        def see(b: Any, h: Any, q: Any, k: Any) -> Any:
            near = k <= q
            if window is not None:
                where = None if first is None else first[b]
                near = near & ~_far(columns[b, q], columns[b, k], window, where)
            if inside is None:
                return near
            own = (k - past).clamp(0, self.length - 1)
            return torch.where(k < past, near, inside(b, h, q - past, own))

        return causal_mask(
            hidden,
            valid,
            config=self._config,
            length=hidden.shape[1],
            offset=used - hidden.shape[1],
            see=None if window is None and inside is None else see,
        )

    def _inside(self, mask: Any, start: int, device: Any) -> Callable[[Any, Any, Any, Any], Any]:
        """What the model's FlexAttention mask says of the tokens of this forward that are left."""
        if mask.shape[-2] != self.chunk:  # the model has taken some rows
            raise UnsupportedModelError(
                f"A FlexAttention mask for {mask.shape[-2]} of {self.chunk} tokens cannot be "
                "shortened; load the model with attn_implementation='sdpa'."
            )
        start, says, index = min(start, mask.shape[-1] - self.chunk), mask.mask_mod, self.index
        if index is None:
            return lambda b, h, q, k: says(b, h, q, start + k)
        index = index.to(device)
        return lambda b, h, q, k: says(b, h, index[b, q], start + index[b, k])

    def _near(self, columns: Tensor, used: int, window: int, first: Tensor | None) -> Tensor:
        """(B, slots) bool, what one new token sees: FlashAttention counts a window in slots."""
        if self.length > 1:
            raise UnsupportedModelError(
                f"FlashAttention counts a sliding window of {window} tokens over the tokens kept, "
                f"but {self.span} tokens came; load the model with attn_implementation='sdpa'."
            )
        where = None if first is None else first[:, None]
        return ~_far(columns[:, used - 1 : used], columns, window, where)


def token_mask(
    attention_mask: Any,
    batch: int,
    seen: int,
    length: int,
    device: Any,
    start: int = 0,
    padding: Tensor | None = None,
) -> Tensor:
    """Which tokens of the sequence so far are no padding, read off whatever mask the model got.

    Args:
        attention_mask: None, (B, n), a prepared (B, 1, q, n) bool or additive mask, or several of
            them by kind of layer.
        batch: Samples B.
        seen: Tokens in the cache.
        length: Tokens of this forward.
        device: Where to put the result.
        start: Slots before them that a prepared mask was made for.
        padding: (B,) padding at the front of the tokens in the cache, where that is known.

    Returns:
        (B, seen + length) bool.

    Raises:
        ModelStateError: The mask is of a form that does not tell.
    """
    total = seen + length
    if isinstance(attention_mask, Mapping):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values())))
    if attention_mask is None:
        return torch.ones(batch, total, dtype=torch.bool, device=device)
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 4):
        raise ModelStateError(
            f"An attention mask of type {type(attention_mask).__name__} does not tell padding from "
            "tokens; pass the tokenizer's 2-D attention_mask and a dynamic cache."
        )
    tokens = attention_mask.to(device)
    if tokens.dim() == 4:  # some query, itself at least, looks at every token that is no padding
        if start != seen and padding is not None:  # a static cache's, which lacks some
            own = token_mask(own_part(tokens, length, start), batch, 0, length, device)
            past = torch.arange(seen, device=device) >= padding.to(device)[:, None]
            return torch.cat([past, own], 1)
        if start != seen:
            raise ModelStateError(
                f"The attention mask was prepared for {start} cached tokens, but {seen} came and "
                "some were dropped; pass the tokenizer's 2-D attention_mask and a dynamic cache."
            )
        tokens = tokens[:, 0] if tokens.dtype == torch.bool else tokens[:, 0] > -1e4
        tokens = tokens.any(-2)
    tokens = tokens[:, :total].bool().expand(batch, -1)
    if tokens.shape[1] < total:
        raise ModelStateError(
            f"The attention mask covers {tokens.shape[1]} tokens, but {seen} are cached and "
            f"{length} are given; pass a mask over all of them."
        )
    return tokens
