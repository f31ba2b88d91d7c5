"""The masks of decoder layers for a sequence from which tokens were dropped.

Masks that the model has made are reused: among the tokens of a call, a mask is the one of the long
sequence at the places that are left. So padding, sliding windows, and blocks of an image whose
tokens see each other keep the meaning that the model gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pore._compat.attention import uses_flash
from pore._compat.caches import slots_of
from pore._compat.masks import causal_mask, has_masks
from pore.engine.cache import CachedTokens
from pore.engine.entered import Entered
from pore.engine.given import chosen_masks
from pore.engine.masks import _chunked, _far, of_layer, own_part
from pore.engine.setup import Setup
from pore.errors import UnsupportedModelError
from pore.tensors.gathering import take, widened

See = Callable[[Any, Any, Any, Any], Any]
"""Tells, for a sample, head, query and key, whether the query sees the key."""


class _Wanted(NamedTuple):
    """What a mask is needed for.

    Attributes:
        slots: Number of keys that the kernel gets.
        window: How many tokens a token looks at, itself included; None means all.
        first: (B,) where each sample starts, in a layer that looks at chunks of that size; None
            if the window slides.
    """

    slots: int
    window: int | None
    first: Tensor | None


class Memo:
    """Shortens each object once: all layers are given the same few objects."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Any] = {}

    def __call__(self, value: Any, hidden: Tensor, make: Callable[..., Any], *key: Any) -> Any:
        """The result of `make(value, hidden)`, computed once for a value, a device and a key."""
        name = (id(value), hidden.device, *key)
        if name not in self._made:
            # `value` is held too, so that no other object gets its id.
            self._made[name] = (value, make(value, hidden))
        return self._made[name][1]


class LayerMasks:
    """Makes the masks of the layers that see the same tokens.

    Args:
        setup: The method in the model.
        entered: How the call's tokens went into the first layer.
        index: (B, m) which of those the layers see; None: all.
        track: What the layers' cache holds, these included.
    """

    def __init__(
        self, setup: Setup, entered: Entered, index: Tensor | None, track: CachedTokens
    ) -> None:
        self._config = setup.config
        self._windows = setup.windows
        self._entered = entered
        self._index = index
        self._track = track
        self._length = entered.length if index is None else index.shape[1]
        self._memo = Memo()

    def needed(self, given: Any, layer: int) -> bool:
        """Whether a layer needs another mask than the one it is given, or needs one at all."""
        if given is not None or not self._track.full or self._entered.masks is not None:
            return True
        if self._track.sizes is not None:
            return True
        window = self._windows[layer]
        return window is not None and self._entered.span > window

    def masks(self, given: Any, hidden: Tensor, cache: Any) -> Any:
        """The masks of all layers for the short sequence, as a decoder takes them.

        Args:
            given: What the model made for the full sequence: a mask, or one for each kind of layer.
            hidden: (B, m, D) the states of the short sequence.
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
            slots: Number of keys that its kernel gets; None if they are those of its cache.
        """
        if slots is None and cache is not None:
            slots = slots_of(cache, self._length, layer)
        elif slots is None:
            slots = self._track.columns.shape[1]
        seen = self._seen(given, hidden, layer, slots)
        if self._track.sizes is None:
            return seen
        return self._memo(seen, hidden, partial(self._counted, slots=slots), "sizes")

    def _seen(self, given: Any, hidden: Tensor, layer: int, slots: int) -> Any:
        """Which token sees which, in the form that the kernel takes; None for purely causal."""
        masks = of_layer(self._entered.masks, self._config, layer)
        if masks is not None:
            return self._memo(masks, hidden, partial(self._chosen, slots=slots), slots)
        want = self._wanted(layer, slots, hidden.device)
        start, lost = self._entered.starts[self._windows[layer] is not None], False
        if self._entered.own is not None or (start is None and self._entered.length > 1):
            given = of_layer(self._entered.own, self._config, layer)
            start, lost = 0, given is None and self._track.columns.shape[1] > self._length > 1
        causal = given is None and self._track.full and want.window is None and not lost
        if causal and self._track.sizes is None:
            return None  # purely causal, as an ascending choice of positions stays
        make = partial(self._mask, want=want, start=start or 0)
        return self._memo(given, hidden, make, slots, want.window, hidden.shape[1])

    def _wanted(self, layer: int, slots: int, device: Any) -> _Wanted:
        first = None
        if _chunked(self._config, layer) and self._entered.padding is not None:
            first = self._entered.padding.to(device)
        return _Wanted(slots, self._window(layer), first)

    def _window(self, layer: int) -> int | None:
        """A layer's sliding window, unless it reaches everything."""
        window = self._windows[layer]
        return None if window is None or self._entered.span <= window else window

    def _counted(self, mask: Tensor, hidden: Tensor, *, slots: int) -> Tensor:
        """A mask with the logarithm of how many times each key counts added: proportional attention
        (ToMe, arXiv 2210.09461, section 3)."""
        assert self._track.sizes is not None
        if mask.dtype == torch.bool:
            closed = torch.finfo(hidden.dtype).min
            mask = hidden.new_zeros(()).masked_fill(~mask, closed)
        more = widened(self._track.sizes[:, -slots:]).log().to(mask)
        return mask + nn.functional.pad(more, (0, slots - more.shape[1]))[:, None, None]

    def _chosen(self, masks: Any, hidden: Tensor, *, slots: int) -> Any:
        """The caller's mask at the tokens that are left."""
        columns = self._track.columns
        rows = columns[:, -hidden.shape[1] :] - (self._entered.span - masks.shape[-2])
        return _padded(chosen_masks(masks, rows, columns, self._track.valid), slots)

    def _mask(self, mask: Any, hidden: Tensor, *, want: _Wanted, start: int) -> Any:
        """A mask from the one that the model made for the full sequence, or a causal one.

        Which tokens of this call see each other is taken from the model's mask. Cached tokens are
        seen, as far as a window reaches in the full sequence.
        """
        length = self._entered.length
        if isinstance(mask, Tensor) and mask.dim() == 2 and not has_masks(self._config):
            left = self._track.valid[:, -want.slots :].to(hidden.device)
            # A user's own kernel gets the mask as the caller gives it.
            return nn.functional.pad(left, (0, want.slots - left.shape[1])).to(mask.dtype)
        if length > 1 and hasattr(mask, "mask_mod"):  # FlexAttention's
            return self._causal(hidden, want, self._inside(mask, start, hidden.device))
        if length == 1 or not isinstance(mask, Tensor) or mask.dim() != 4:
            return self._causal(hidden, want)
        return self._widened(self._own(own_part(mask, length, start), hidden), hidden, want)

    def _own(self, mask: Tensor, hidden: Tensor) -> Tensor:
        """(B, H, rows, m) which of the tokens left see each other, from a mask for all tokens."""
        rows = hidden.shape[1]
        mask = mask.expand(self._track.columns.shape[0], -1, -1, -1)
        whole = mask.shape[-2] == self._entered.length  # or the model has taken the last rows
        if self._index is None:
            return mask[..., -rows:, :] if whole else mask
        if whole:
            mask = take(mask.transpose(0, 1), self._index[:, -rows:], -2).transpose(0, 1)
        index = self._index.to(mask.device)[:, None, None]
        return mask.gather(-1, index.expand(-1, *mask.shape[1:3], -1))

    def _widened(self, mask: Tensor, hidden: Tensor, want: _Wanted) -> Tensor:
        """A mask among tokens, extended by what they see of the cache before them."""
        columns, valid = (x.to(hidden.device) for x in (self._track.columns, self._track.valid))
        rows, past = hidden.shape[1], columns.shape[1] - self._length
        closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        opened = True if mask.dtype == torch.bool else 0.0
        mask = nn.functional.pad(mask, (past, 0), value=opened)
        if not self._track.full:
            mask = mask.masked_fill(~valid[:, None, None], closed)
        if want.window is not None:
            first = None if want.first is None else want.first[:, None, None]
            far = _far(columns[:, -rows:, None], columns[:, None, :past], want.window, first)
            far = nn.functional.pad(far, (0, self._length))
            mask = mask.masked_fill(far[:, None], closed)
        return _padded(mask, want.slots)

    def _causal(self, hidden: Tensor, want: _Wanted, inside: See | None = None) -> Any:
        """A new mask: tokens of this call see each other as `inside` says, or those before them."""
        slots, window, first = want
        columns, valid = (
            x.to(hidden.device)[:, -slots:] for x in (self._track.columns, self._track.valid)
        )
        used = valid.shape[1]
        past = used - self._length
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
            own = (k - past).clamp(0, self._length - 1)
            return torch.where(k < past, near, inside(b, h, q - past, own))

        return causal_mask(
            hidden,
            valid,
            config=self._config,
            length=hidden.shape[1],
            offset=used - hidden.shape[1],
            see=None if window is None and inside is None else see,
        )

    def _inside(self, mask: Any, start: int, device: Any) -> See:
        """What the model's FlexAttention mask says of the tokens of this call that are left."""
        length, says, index = self._entered.length, mask.mask_mod, self._index
        if mask.shape[-2] != length:  # the model has taken some rows
            raise UnsupportedModelError(
                f"A FlexAttention mask for {mask.shape[-2]} of {length} tokens cannot be "
                "shortened; load the model with attn_implementation='sdpa'."
            )
        start = min(start, mask.shape[-1] - length)
        if index is None:
            return lambda b, h, q, k: says(b, h, q, start + k)
        index = index.to(device)
        return lambda b, h, q, k: says(b, h, index[b, q], start + index[b, k])

    def _near(self, columns: Tensor, used: int, window: int, first: Tensor | None) -> Tensor:
        """(B, slots) bool, what one new token sees, as FlashAttention counts a window in slots."""
        if self._length > 1:
            raise UnsupportedModelError(
                f"FlashAttention counts a sliding window of {window} tokens over the tokens kept, "
                f"but {self._entered.span} tokens came; load the model with "
                "attn_implementation='sdpa'."
            )
        where = None if first is None else first[:, None]
        return ~_far(columns[:, used - 1 : used], columns, window, where)


def _padded(mask: Tensor, slots: int) -> Tensor:
    """Fit a mask to the last slots of a cache; empty slots are not seen.

    A cache drops tokens that no later token can see; a static cache has empty slots at the end.
    """
    closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    mask = mask[..., -slots:]
    return nn.functional.pad(mask, (0, slots - mask.shape[-1]), value=closed)
