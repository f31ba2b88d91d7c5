"""Caches as arguments, and what must hold of quantised ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, LlavaForConditionalGeneration
from transformers.cache_utils import Cache

import pore
from helpers.models import batch, prompt, tiny_llava
from pore._compat.caches import cache_argument


def as_argument(cache: Cache | None) -> dict[str, Any]:
    """A cache as an argument of models and of `generate`, by its name in this transformers."""
    return cache_argument(LlavaForConditionalGeneration.forward, cache)


def check_quantized(make: Callable[[Any], Cache], dtype: torch.dtype, again: bool = True) -> None:
    """A quantised cache holds the tokens that are left, quantised, and nothing else.

    Args:
        make: Makes the cache for a decoder's config.
        dtype: The model's floating type.
        again: Whether new tokens are quantised only once there are many: then the answer must be
            that with a plain cache whose states were quantised by hand after the prefill.
    """
    model = tiny_llava(dtype=dtype)
    config = model.config.text_config
    inputs = batch([prompt(3, 1, 5), prompt(7, 1, 2, 1)], dtype=dtype)
    caches, found = (DynamicCache(config=config), make(config)), []
    for cache in caches:
        mask = inputs["attention_mask"]
        with torch.no_grad(), pore.FastV(keep=5, layer=2)(model) as run:
            logits = [model(**inputs, **as_argument(cache)).logits]
            lengths = [int(cache.get_seq_length(layer)) for layer in range(5)]
            if cache is caches[0]:
                for held, by in zip(cache.layers, make(config).layers, strict=True):
                    by.update(held.keys, held.values)
                    held.keys = by._dequantize(by._quantized_keys)
                    held.values = by._dequantize(by._quantized_values)
            for token in (7, 8, 9):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                new = {"input_ids": torch.full((2, 1), token), "attention_mask": mask}
                logits.append(model(**new, **as_argument(cache)).logits)
        found.append((logits, lengths, [sample.images for sample in run.report]))
    (expected, *rest), (got, *same) = found
    assert rest == same
    assert rest[0] == [25, 25, 14, 14, 14]
    assert torch.equal(got[0], expected[0])
    assert all(bool(torch.isfinite(step).all()) for step in got)
    if again:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
