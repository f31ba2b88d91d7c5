"""The inputs of decoder layers after tokens were dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pore._compat.arguments import MASK, POSITIONS, ROTARY
from pore._compat.attention import layer_number, uses_flash
from pore._compat.caches import cache_in, slots_of
from pore._compat.masks import causal_mask, has_masks
from pore.engine.cache import CachedTokens
from pore.engine.given import chosen_masks
from pore.engine.masks import _chunked, _far, of_layer, own_part, window_of
from pore.errors import UnsupportedModelError
from pore.tensors.gathering import take


class LayerInputs:
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
        track: CachedTokens,
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

    def shared(self, states: tuple[Tensor, Tensor], source: LayerInputs) -> tuple[Tensor, Tensor]:
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
        source: LayerInputs | None = None,
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
        self, layer: int, source: LayerInputs | None, rotary: Any, hidden: Tensor
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

    def _present(self, track: CachedTokens, hidden: Tensor) -> Tensor | None:
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
