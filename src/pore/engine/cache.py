"""What the layers of a shortened sequence hold in the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pore._compat.caches import cached_keys, slots_of


def padding_before(tokens: Tensor) -> Tensor:
    """(B,) for (B, n) tokens, how many come before the first that is not padding."""
    return (tokens.cumsum(1) == 0).sum(1)


def keys_before(cache: Any, layer: int, past: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The part of a layer's cache that `length` new tokens see.

    Args:
        cache: The cache, or None.
        layer: The layer, from 0.
        past: (B, n) bool, False at padding, of the slots that it was given.
        length: New tokens.

    Returns:
        keys (B, G, m, d) and valid (B, m) bool, for the m latest slots that a sliding window
        leaves.
    """
    keys, count = cached_keys(cache, layer), past.shape[1]
    if count == 0 or keys is None:
        return past.new_empty(len(past), 1, 0, 1), past[:, :0]
    left = min(count, slots_of(cache, length, layer) - length)
    keys = keys[:, :, :count]
    return keys[:, :, keys.shape[2] - left :], past[:, count - left :]


class CachedTokens:
    """What the layers from one stage on hold in the cache, in positions of the full sequence.

    Attributes:
        columns: (B, M) the position in the full sequence of every slot of the cache.
        valid: (B, M) bool, False at filling.
        full: Whether all slots are valid.
        sizes: (B, M) how many times attention counts the key of every slot; None: each once.
    """

    def __init__(
        self, columns: Tensor, valid: Tensor, full: bool, sizes: Tensor | None = None
    ) -> None:
        self.columns = columns
        self.valid = valid
        self.full = full
        self.sizes = sizes

    @classmethod
    def unpruned(cls, tokens: Tensor) -> CachedTokens:
        """The cached tokens of a sequence from which nothing was dropped.

        Args:
            tokens: (B, n) bool, False at padding.
        """
        columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return cls(columns, tokens, bool(tokens.all()))

    def extended(
        self, columns: Tensor, valid: Tensor, full: bool, sizes: Tensor | None = None
    ) -> CachedTokens:
        """These tokens with further slots.

        Args:
            columns: (B, m) positions of the new slots in the full sequence.
            valid: (B, m) bool.
            full: Whether all new slots are valid.
            sizes: (B, m) how many times attention counts their keys; None: each once.
        """
        device, parts = self.columns.device, None
        counted = next((one for one in (sizes, self.sizes) if one is not None), None)
        if counted is not None:
            pairs = ((self.sizes, self.columns), (sizes, columns))
            parts = [counted.new_ones(held.shape) if n is None else n for n, held in pairs]
        return CachedTokens(
            torch.cat([self.columns, columns.to(device)], 1),
            torch.cat([self.valid, valid.to(device)], 1),
            self.full and full,
            None if parts is None else torch.cat([part.to(device) for part in parts], 1),
        )

    def places(self, other: CachedTokens, span: int) -> Tensor:
        """(B, m) for cached tokens that are some of these, where among these each of them is.

        Args:
            other: The cached tokens to look for.
            span: Tokens of the full sequence.
        """
        columns = self.columns.to(other.columns.device)
        slots = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
        where = columns.new_zeros(len(columns), span).scatter_(1, columns, slots)
        return where.gather(1, other.columns)

    def hiding(self, other: CachedTokens) -> CachedTokens:
        """These tokens with all those taken for filling that are not among others.

        Args:
            other: The cached tokens that are left of these.
        """
        columns, valid = (x.to(self.columns.device) for x in (other.columns, other.valid))
        there = columns.new_zeros(len(columns), int(self.columns.max()) + 1)
        there = there.scatter_add(1, columns, valid.long()).gather(1, self.columns) > 0
        left = self.valid & there
        return CachedTokens(self.columns, left, bool(left.all()), self.sizes)

    def cropped(self, count: int) -> CachedTokens:
        """These tokens without the last `count` slots.

        Assisted decoding removes rejected tokens from the end of the cache.
        """
        length = max(self.columns.shape[1] - count, 0)
        sizes = None if self.sizes is None else self.sizes[:, :length]
        return CachedTokens(self.columns[:, :length], self.valid[:, :length], self.full, sizes)
