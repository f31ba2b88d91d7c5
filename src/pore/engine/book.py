"""What is known about the caches used in a block; `CacheBook` looks it up."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pore._compat.arguments import MASK, POSITIONS
from pore._compat.attention import layer_number
from pore.changes import is_changed
from pore.engine.records import CacheRecord, copied_record, keep_record, record_of
from pore.engine.setup import Setup
from pore.errors import ModelStateError
from pore.tensors.gathering import take


class CacheBook:
    """Knows which tokens every cache holds and lacks, and refuses a cache that cannot be continued.

    The records lie in the caches themselves (`records`), because a cache may be copied, cropped or
    used in another block between two calls.

    Args:
        setup: The method in the model.
    """

    def __init__(self, setup: Setup) -> None:
        family = setup.family
        self._method = setup.method
        self._is_pruned = partial(_is_pruned, weakref.ref(setup.model))
        self._layers = [  # that hold keys of their own
            layer_number(family.attention(layer))
            for i, layer in enumerate(setup.layers)
            if not family.recurrent(layer) and i not in setup.sources
        ]

    def record(self, cache: Any, batch: int, length: int) -> CacheRecord:
        """What is known about a cache; a call brings it up to date.

        Args:
            cache: The cache, or None.
            batch: Number of samples in the call.
            length: Number of tokens in the call.

        Raises:
            ModelStateError: It lacks tokens that another method dropped, or was changed in between.
        """
        if cache is None:
            return CacheRecord()
        known = record_of(cache)
        cached = cache.get_seq_length()
        if isinstance(cached, Tensor):  # a static cache's, on its device
            cached = int(cached) if known is None or length > 1 else known.cached
        if known is None:
            known = self._begun_elsewhere(cache, cached)
        if cached == 0:
            return CacheRecord()
        if not known.lacks:  # it holds all that came, in blocks or not
            return CacheRecord(seen=cached, cached=cached, marked=known.marked)
        if not _same(known.settings, self._method):
            raise ModelStateError(
                "Some layers of this cache lack tokens that were dropped in another block, by "
                f"{known.settings!r}. Continue a conversation in the block where it began, or in "
                "one of the same method and settings, with the same cache or a copy."
            )
        if cached != known.cached or batch != known.rows:
            raise ModelStateError(
                f"This cache was left with {known.cached} tokens for {known.rows} samples, but it "
                f"holds {cached} tokens, and {batch} samples follow: a forward failed halfway, or "
                "it was changed other than by its own methods. Begin again with a new cache."
            )
        return known.copied()

    def _begun_elsewhere(self, cache: Any, cached: int) -> CacheRecord:
        """What is known about a cache without a record.

        It is empty, or was filled by the unpruned model, or was copied tensor by tensor.
        """
        if cached == 0:
            return CacheRecord()
        copied = copied_record(cache, self._layers)
        if copied is not None:
            return copied
        if any(int(cache.get_seq_length(i)) != cached for i in self._layers):
            raise ModelStateError(
                "Some layers of this cache lack tokens: they were dropped in another block, or a "
                "forward failed halfway. Begin again with a new cache."
            )
        return CacheRecord(seen=cached, cached=cached)

    def check_goes_on(self, record: CacheRecord, inputs: dict[str, Any], length: int) -> None:
        """Refuse tokens that do not follow those in the cache.

        `generate` cuts as many tokens off a whole conversation as the cache holds, but the cache
        lacks tokens that were dropped before the first layer.

        Args:
            record: What is known about the cache.
            inputs: Arguments of the multimodal model by name.
            length: Tokens of the call.

        Raises:
            ModelStateError: Positions were given that do not follow.
        """
        given, mask = inputs.get(POSITIONS), inputs.get(MASK)
        if record.last is None or not isinstance(given, Tensor):
            return
        column = torch.zeros(record.last.shape[-2], 1, dtype=torch.long, device=given.device)
        if isinstance(mask, Tensor) and mask.dim() == 2:  # the first after padding
            column = mask[:, -length:].long().argmax(1)[:, None].to(given.device)
        first, last = take(given, column, -1), record.last.to(given.device)
        if first.dim() == 3 and first.shape != last.shape:
            # With and without a plane of text positions in front.
            first, last = first[-1], last[-1]
        if bool((first != last + 1).any()):
            raise ModelStateError(
                f"The tokens given do not follow those in the cache. {self._method.name} drops "
                "tokens before the first layer, so the cache is shorter than the conversation: "
                "give only the tokens that are not in it yet, with an attention_mask over all, and "
                "no mm_token_type_ids of earlier turns."
            )

    def keep(self, cache: Any, record: CacheRecord) -> None:
        """Attach a record to a cache, once a successful call has brought it up to date."""
        if record.lacks:
            record.settings = self._method
            record.is_open = self._is_pruned
        keep_record(cache, record)


def _same(settings: Any, other: Any) -> bool:
    """Whether two methods are the same with the same settings."""
    if settings is other:
        return True
    try:
        return type(settings) is type(other) and bool(settings == other)
    except (
        RuntimeError,
        TypeError,
        ValueError,
    ):  # settings that cannot be compared, such as tensors
        return False


def _is_pruned(model: weakref.ref[nn.Module]) -> bool:
    """Whether a model is pruned now."""
    found = model()
    return found is not None and is_changed(found)
