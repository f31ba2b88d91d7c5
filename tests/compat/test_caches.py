"""What a cache holds, and what it is called."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

from helpers.models import tiny_llava
from pore._compat.caches import (
    cache_argument,
    cache_in,
    cached_keys,
    check_cache_name,
    sliding_layers,
    slots_of,
    without_cache,
)
from pore.errors import InputError, UnsupportedModelError


def test_what_a_cache_holds() -> None:
    """`cache.get_mask_sizes`, `cache.is_sliding` and `cache.layers[i].keys`."""
    config = tiny_llava(layers=2).model.language_model.config
    keys, values = torch.randn(2, 1, 2, 5, 8).unbind(0)
    cache = DynamicCache(config=config)
    assert cached_keys(None, 0) is None
    assert cached_keys(cache, 0) is None
    assert slots_of(cache, 5, 0) == 5
    cache.update(keys, values, 0)
    assert torch.equal(cached_keys(cache, 0), keys)
    assert slots_of(cache, 1, 0) == 6
    assert sliding_layers(cache) == [False, False]
    static = StaticCache(config=config, max_cache_len=9)
    static.update(keys, values, 0)
    assert slots_of(static, 1, 0) == 9
    assert torch.equal(cached_keys(static, 0)[:, :, :5], keys)
    sliding = SimpleNamespace(is_sliding=[True, False])
    assert sliding_layers(sliding) == [True, False]
    assert sliding_layers(None) == []


def test_caches_know_which_layers_slide() -> None:
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=4,
    )
    cache = DynamicCache(config=config)
    assert sliding_layers(cache) == [True, False, True]
    keys = torch.randn(1, 1, 6, 8)
    for layer in range(3):
        cache.update(keys, keys, layer)
    assert [slots_of(cache, 1, layer) for layer in range(3)] == [4, 7, 4]


def test_the_cache_is_found_by_what_it_is() -> None:
    cache = transformers.DynamicCache()
    for name in ("cache", "past_key_values", "anything"):
        assert cache_in({"use_cache": True, name: cache}) is cache
        assert without_cache({"x": 1, name: cache}) == {"x": 1, name: None}
    assert cache_in((torch.ones(1), cache)) is cache
    assert cache_in({"x": 1}) is None
    assert cache_in(None) is None

    def takes(cache: Any) -> None: ...

    def took(past_key_values: Any) -> None: ...

    def unknown(memory: Any) -> None: ...

    assert cache_argument(takes, cache) == {"cache": cache}
    assert cache_argument(took, cache) == {"past_key_values": cache}
    with pytest.raises(UnsupportedModelError, match="takes no cache by a name"):
        cache_argument(unknown, cache)


def test_a_name_that_a_model_would_not_read_is_refused() -> None:
    class New:
        def forward(self, cache: Any = None, **kwargs: Any) -> None: ...

    class Old:
        def forward(self, past_key_values: Any = None, **kwargs: Any) -> None: ...

    class Passing:
        def forward(self, **kwargs: Any) -> None: ...

    cache = transformers.DynamicCache()
    for kind in (New, Passing):
        check_cache_name(kind, {"cache": cache})
        check_cache_name(kind, {"past_key_values": cache})
    check_cache_name(Old, {"past_key_values": cache, "cache": None})
    with pytest.raises(InputError, match=r"Old .* pass the cache as past_key_values"):
        check_cache_name(Old, {"cache": cache})
