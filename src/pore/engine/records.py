"""Which tokens a key-value cache lacks: a record that stays with the cache.

A cache is filled in one call of the model and read in the next, and in between it belongs to its
owner, who may copy it, crop it, or repeat, select and reorder its rows. So the record is part of
the cache: whatever the cache's own methods do to its rows, they do to the record, and outside of a
block a cache that lacks tokens refuses to be used.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pore._compat.cache_owners import CacheOwner, owned, owner_of
from pore._compat.caches import cached_keys
from pore.engine.cache import CachedTokens
from pore.errors import ModelStateError

START = -1
"""Stands among the numbers of stages for the layers before the first."""

_known: weakref.WeakSet[Any] = weakref.WeakSet()
"""All caches that have a record."""


@dataclass
class CacheRecord(CacheOwner):
    """What is known about one key-value cache.

    Its tensors are never written to, so that records may share them.

    Attributes:
        seen: Tokens of the prompt and the answer so far, dropped ones included.
        cached: Slots in the cache of the first layer.
        entry: What all layers hold, in positions of the full sequence, where a stage on the
            embeddings has dropped tokens; None where none has.
        padding: (B,) padding at the front of the sequence that windows are counted over.
        total: (B, 1) tokens so far, dropped ones included, padding not; where `entry` is.
        last: (..., B, 1) position of the last token, where the model was given positions; likewise.
        marked: The marks that were used for it, see `Run.mark_visual`.
        tracks: For every stage inside the decoder that has dropped tokens, what its layers hold;
            where stages forget, for `START` what those before hold.
        checked: Whether the first new token after a prompt was looked at.
        settings: The method that dropped tokens, with its settings; None before any were.
        is_open: Whether the model that the cache belongs to is pruned now.
    """

    seen: int = 0
    cached: int = 0
    entry: CachedTokens | None = None
    padding: Tensor | None = None
    total: Tensor | None = None
    last: Tensor | None = None
    marked: Tensor | None = None
    tracks: dict[int, CachedTokens] = field(default_factory=dict)
    checked: bool = False
    settings: Any = None
    is_open: Callable[[], bool] | None = None

    @property
    def lacks(self) -> bool:
        """Whether the cache lacks tokens that came."""
        return self.entry is not None or bool(self.tracks)

    @property
    def rows(self) -> int | None:
        """Number of samples; None if the record says nothing about single samples."""
        return None if self.padding is None else len(self.padding)

    def copied(self) -> CacheRecord:
        """The record of a copy of the cache."""
        return replace(self, tracks=dict(self.tracks))

    def __deepcopy__(self, _: Any) -> CacheRecord:
        return self.copied()

    def forget(self) -> None:
        """Hide in the layers before the last stage what it has dropped, where stages forget."""
        if START not in self.tracks:
            return
        last = self.tracks[max(self.tracks)]
        if len(self.tracks) == 1:  # none has dropped anything
            self.tracks = {}
            return
        self.tracks = {number: track.hiding(last) for number, track in self.tracks.items()}

    # -- what the cache's own methods do to it ----------------------------------------------------

    def take_rows(self, take: Callable[[Tensor], Tensor]) -> None:
        """Do to the record what was done to the rows of the cache.

        Args:
            take: Gives rows of a tensor whose dimension 0 is the batch.
        """

        def of(track: CachedTokens) -> CachedTokens:
            sizes = None if track.sizes is None else take(track.sizes)
            return CachedTokens(take(track.columns), take(track.valid), track.full, sizes)

        self.entry = None if self.entry is None else of(self.entry)
        self.tracks = {number: of(track) for number, track in self.tracks.items()}
        self.padding = None if self.padding is None else take(self.padding)
        self.total = None if self.total is None else take(self.total)
        if self.last is not None:
            self.last = take(self.last.movedim(-2, 0)).movedim(0, -2)

    def check_crop(self, count: int) -> None:
        """Refuse to remove the last `count` slots if the layers hold different tokens in them.

        Raises:
            ModelStateError: Some of these tokens were dropped.
        """
        entry = [] if self.entry is None else [self.entry]
        for track in [] if count >= self.cached else [*entry, *self.tracks.values()]:
            gone = track.columns[:, -count:]
            if count and bool((gone[:, -1] - gone[:, 0] != count - 1).any()):
                raise ModelStateError(
                    f"The last {count} tokens were to be cropped from the cache, but among them "
                    "were some that are not in every layer; crop no further back than the end "
                    "of the image."
                )

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens, as assisted decoding does with rejected ones."""
        if count >= self.cached:
            self.reset()
            return
        self.seen -= count
        self.cached -= count
        self.total = None if self.total is None else self.total - count
        self.last = None if self.last is None else self.last - count
        self.entry = None if self.entry is None else self.entry.cropped(count)
        self.tracks = {number: track.cropped(count) for number, track in self.tracks.items()}

    def reset(self) -> None:
        """Forget all: the cache is empty."""
        self.adopt(CacheRecord())

    def check_use(self) -> None:
        """Refuse to let the unpruned model continue with a cache that lacks tokens.

        Raises:
            ModelStateError: It would do so.
        """
        if self.lacks and not (self.is_open is not None and self.is_open()):
            raise ModelStateError(
                f"This cache lacks visual tokens that {self.settings!r} dropped in a block that "
                "has ended, and the model is not pruned now; continue in a block of the same "
                "method, or give the whole prompt with a new cache."
            )

    # -- changes ----------------------------------------------------------------------------------

    def adopt(self, other: CacheRecord) -> None:
        """Take over the content of another record, for all who share this one."""
        self.__dict__.update(other.copied().__dict__)


def record_of(cache: Any) -> CacheRecord | None:
    """The record of a cache; None where no block has filled it."""
    found = owner_of(cache)
    return found if isinstance(found, CacheRecord) else None


def keep_record(cache: Any, record: CacheRecord) -> None:
    """Attach a record to a cache and to all its copies.

    Args:
        cache: A cache.
        record: What is known of it.
    """
    found = record_of(cache)
    if found is None:
        owned(cache, record)
        _known.add(cache)
    else:
        found.adopt(record)


def copied_record(cache: Any, layers: Sequence[int]) -> CacheRecord | None:
    """The record of the cache that a cache without one was copied from, tensor by tensor.

    Args:
        cache: A cache that is not empty.
        layers: The layers of attention that hold keys of their own.
    """
    for known in list(_known):
        record = record_of(known)
        if record is not None and _same_keys(cache, known, layers):
            return record.copied()
    return None


def _same_keys(cache: Any, other: Any, layers: Sequence[int]) -> bool:
    """Whether two caches hold the same keys; the last layer with keys is compared first."""
    if any(int(cache.get_seq_length(i)) != int(other.get_seq_length(i)) for i in layers):
        return False
    for i in reversed(layers):
        keys, others = cached_keys(cache, i), cached_keys(other, i)
        if keys is not None and others is not None and keys.numel():
            return keys.shape == others.shape and torch.equal(keys, others.to(keys.device))
    return False
