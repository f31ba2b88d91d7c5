"""How the tokens of a call go into the first decoder layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pore.engine.cache import CachedTokens


@dataclass(frozen=True)
class Entered:
    """How the tokens of a call, or what is left of them, go into the first decoder layer.

    Two sequences are counted. One is what the first layer's cache holds. The other is the whole
    conversation, dropped tokens included: sliding windows reach as far in it as without pruning,
    where tokens keep their positions. Without stages on the embeddings the two are the same.

    Attributes:
        length: Tokens that go in.
        start: Slots in the first layer's cache before them.
        span: Number of tokens so far, these included, in the sequence that sliding windows count
            over.
        cached: (B, start) bool, False at padding, of the slots in the first layer's cache.
        columns: (B, length) where in the whole conversation they are; None where windows count over
            what the cache holds.
        before: The tokens of the whole conversation that the cache held before; None likewise.
        starts: Where they start in the masks that the model makes, of layers without and with a
            sliding window; None where those are of a cache with other slots.
        masks: The caller's own masks over the sequence of `span`, in place of all others; or None.
        own: Masks of these tokens alone, in place of the model's where those do not fit a cache
            that lacks tokens; None for causal ones.
        padding: (B,) padding at the front of that sequence.
    """

    length: int
    start: int
    span: int
    cached: Tensor
    columns: Tensor | None = None
    before: CachedTokens | None = None
    starts: tuple[int | None, int | None] = (0, 0)
    masks: Any = None
    own: Any = None
    padding: Tensor | None = None
