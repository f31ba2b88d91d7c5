"""Attention masks in the form that each kernel takes.

The public functions of `transformers.masking_utils` read the number of cached tokens from the first
layer of the cache. After pruning, layers differ in it; these functions take it as an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pore._compat.attention import attention_name
from pore._compat.caches import cache_argument


def has_masks(config: Any) -> bool:
    """Whether transformers knows what masks the kernel of a config takes.

    A kernel that a user registered without masks gets the caller's mask, or none.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return attention_name(config) in ALL_MASK_ATTENTION_FUNCTIONS


def causal_mask(
    hidden: Tensor,
    valid: Tensor,
    *,
    config: Any,
    length: int,
    offset: int,
    see: Callable[[Any, Any, Any, Any], Any] | None = None,
) -> Any:
    """A causal mask in the form that the kernel of a config takes.

    transformers makes its own masks with `ALL_MASK_ATTENTION_FUNCTIONS` and `causal_mask_function`
    of `masking_utils`. `create_causal_mask`, which calls them, takes the number of slots from the
    first layer of the cache, which is wrong if other layers hold fewer tokens.

    Args:
        hidden: (B, length, D) states of the queries.
        valid: (B, slots) bool, False at keys that nothing sees.
        config: The decoder's config.
        length: Number of queries.
        offset: Number of keys before the first query.
        see: Tells for sample, head, query and key whether the query sees the key; None is causal.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

    # A user's kernel without masks gets what kernels are documented to get: a 4-D mask.
    make = ALL_MASK_ATTENTION_FUNCTIONS[attention_name(config) if has_masks(config) else "sdpa"]
    return make(
        batch_size=hidden.shape[0],
        q_length=length,
        kv_length=valid.shape[1],
        q_offset=offset,
        kv_offset=0,
        mask_function=see or causal_mask_function,
        attention_mask=valid,
        allow_is_causal_skip=False,
        dtype=hidden.dtype,
        config=config,
        device=hidden.device,
    )


def block_masks(config: Any, embeds: Tensor, tokens: Tensor, cache: Any, blocks: Tensor) -> Any:
    """Masks by kind of layer, in which the tokens of a block see each other.

    Models make their masks with `create_masks_for_generate` of `masking_utils`. The public method
    with that name does not do for Gemma 4 Unified, whose forward uses other masks.

    Args:
        config: The decoder's config.
        embeds: (B, L, D) embeddings of a prompt.
        tokens: (B, n + L) bool, False at padding; the first n are in the cache.
        cache: The cache, or None.
        blocks: (B, n + L) the number of the block of every token, -1 for none.
    """
    from transformers import masking_utils

    return own_masks(masking_utils, config, embeds, tokens, cache, block_sequence_ids=blocks)


def own_masks(
    kind: Any, config: Any, embeds: Tensor, tokens: Tensor, cache: Any, **types: Tensor
) -> Any:
    """The masks that a class of models makes for `generate`, by kind of layer.

    Args:
        kind: The class, or whatever else has a `create_masks_for_generate`.
        config: The model's config.
        embeds: (B, L, D) embeddings of the prompt.
        tokens: (B, n + L) bool, False at padding; the first n tokens are in the cache.
        cache: The cache before the prompt, or None.
        **types: (B, n + L) types of the tokens, under the name that `kind` has for them.
    """
    create = kind.create_masks_for_generate
    return create(
        config=config,
        inputs_embeds=embeds,
        attention_mask=tokens,
        position_ids=None,
        **types,
        **cache_argument(create, cache),
    )
