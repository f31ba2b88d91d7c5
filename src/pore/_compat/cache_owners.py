"""Makes a cache tell our owner object what is done to its rows, and copy the owner with itself.

No hook of transformers says when `generate` repeats, selects, reorders or crops the rows of a
cache, as it does in beam search and assisted decoding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor


class CacheOwner(ABC):
    """An object that belongs to a cache and is told what is done to its rows."""

    @abstractmethod
    def take_rows(self, take: Callable[[Tensor], Tensor]) -> None:
        """Rows were selected, repeated or reordered."""

    @abstractmethod
    def check_crop(self, count: int) -> None:
        """The last `count` slots are about to be dropped; raises if they must not be."""

    @abstractmethod
    def crop(self, count: int) -> None:
        """The last `count` slots have been dropped."""

    @abstractmethod
    def reset(self) -> None:
        """The cache has been emptied."""

    @abstractmethod
    def check_use(self) -> None:
        """A model is about to use the cache; raises if it must not."""


class _Owned:
    """Methods of a cache that tell its owner; a base class before the cache's own class."""

    _pore_owner: CacheOwner

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self._pore_owner.check_use()
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> Any:
        self._pore_owner.check_use()  # before layers without keys change their states
        return super().get_mask_sizes(*args, **kwargs)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._pore_owner.take_rows(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._pore_owner.take_rows(lambda rows: rows[indices.to(rows.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._pore_owner.take_rows(lambda rows: rows[beam_idx.to(rows.device)])

    def crop(self, tokens_to_remove: int) -> None:
        length = int(self.get_seq_length())  # type: ignore[attr-defined]
        count = -int(tokens_to_remove)  # a tensor, in assisted decoding
        if tokens_to_remove > 0:  # up to 5.17 this is the length that is left
            count = max(length - int(tokens_to_remove), 0)
        self._pore_owner.check_crop(count)
        super().crop(-count)  # type: ignore[misc]
        if count:
            self._pore_owner.crop(count)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._pore_owner.reset()


CACHE_METHODS = frozenset(name for name in vars(_Owned) if not name.startswith("_"))
"""The methods of a cache that change the rows of its samples, or are called before its use."""


@lru_cache(maxsize=64)
def _owned_class(kind: type) -> type:
    return type(kind.__name__, (_Owned, kind), {"__module__": kind.__module__})


def owned(cache: Any, owner: CacheOwner) -> None:
    """Give a cache an owner, which every copy takes along; `isinstance` still finds its class.

    No hook of transformers says when rows of a cache are repeated, selected or cropped.
    """
    cache._pore_owner = owner
    kind: Any = type(cache)
    cache.__class__ = _owned_class(kind)


def owner_of(cache: Any) -> CacheOwner | None:
    """The owner of a cache."""
    found: CacheOwner | None = getattr(cache, "_pore_owner", None)
    return found
