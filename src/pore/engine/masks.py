"""Reading masks: sliding windows, the part for the tokens of a call, which tokens are padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pore._compat.caches import sliding_layers, slots_of
from pore.errors import ModelStateError, UnsupportedModelError


def window_of(config: Any, layer: int) -> int | None:
    """The sliding window of a decoder layer, or the size of its chunks.

    Args:
        config: The decoder's config.
        layer: The layer, from 0.

    Returns:
        The largest number of tokens that a token looks at, itself included; None if it looks at
        all of them.
    """
    kinds = getattr(config, "layer_types", None)
    if _chunked(config, layer):
        chunk: int | None = config.attention_chunk_size
        return chunk
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def _chunked(config: Any, layer: int) -> bool:
    """Whether tokens look as far as where their chunk of the sequence starts (Llama 4)."""
    kinds = getattr(config, "layer_types", None)
    return kinds is not None and kinds[layer] == "chunked_attention"


def _far(query: Tensor, key: Tensor, window: int, first: Tensor | None) -> Tensor:
    """Which keys are out of a window.

    Args:
        query: Positions in the full sequence, and `key`, those of the keys.
        key: See `query`.
        window: Its size.
        first: Where the sequence starts after its padding, for chunks of that size; None where
            the window slides.
    """
    if first is None:
        return query - key >= window
    return (query - first) // window != (key - first) // window


def of_layer(masks: Any, config: Any, layer: int) -> Any:
    """The mask of a layer.

    Args:
        masks: What a decoder takes: a mask, or one by kind of layer.
        config: The decoder's config.
        layer: The layer, from 0.
    """
    return masks[config.layer_types[layer]] if isinstance(masks, Mapping) else masks


def own_slots(cache: Any, sliding: bool) -> int:
    """Where the tokens of a forward start among the slots that the model makes masks for.

    Masks of a kind are made for the first layer of that kind in the cache.

    Args:
        cache: The cache before the forward, or None.
        sliding: Whether the mask is that of layers with a sliding window.

    Returns:
        The number of slots before, unless the cache has dropped some since.
    """
    if cache is None:
        return 0
    kinds = sliding_layers(cache)
    return int(cache.get_seq_length(kinds.index(sliding) if sliding in kinds else 0))


def check_own_slot(masks: Any, cache: Any, length: int) -> None:
    """Refuse masks in which layers with a sliding window do not show a decoded token itself.

    Of several tokens, masks that are narrower than what these layers hold.

    transformers 5.16 makes them, for Gemma 3 and a static cache or a token with its type, for the
    first layer without one, which may hold fewer tokens.

    Args:
        masks: What the decoder is given: one by kind of layer, or anything else.
        cache: The cache before the forward.
        length: Tokens of the forward.

    Raises:
        UnsupportedModelError: They do not.
    """
    mask = masks.get("sliding_attention") if isinstance(masks, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return
    slot, kinds = own_slots(cache, sliding=True), sliding_layers(cache)
    if length == 1 and slot < mask.shape[-1]:
        seen = mask[..., -1, slot]
        right = bool((seen if seen.dtype == torch.bool else seen > -1e4).all())
    else:  # or a cache has let go of what is out of the window
        right = True not in kinds or mask.shape[-1] >= slots_of(cache, length, kinds.index(True))
    if not right:
        raise UnsupportedModelError(
            "This version of transformers makes the masks of layers with a sliding window for a "
            "layer that holds fewer tokens; use a dynamic cache without marks of what tokens are, "
            "a method that acts on the embeddings, or transformers 5.20 or newer."
        )


def own_part(mask: Tensor, length: int, start: int) -> Tensor:
    """The columns of a mask for the tokens of the forward that it was made for.

    Args:
        mask: (B, H, length, n) mask.
        length: Tokens of the forward.
        start: Slots before them, some of which the cache may have dropped.

    Returns:
        (B, H, length, length) part of the mask.
    """
    start = min(start, mask.shape[-1] - length)
    return mask[..., start : start + length]


def own_parts(masks: Any, length: int, start: int) -> Any:
    """`own_part` of what a decoder takes: of a mask, or of one by kind of layer.

    Only 4-D masks say more than which tokens are padding; None stands for the others.
    """
    if isinstance(masks, Mapping):
        return {kind: own_parts(mask, length, start) for kind, mask in masks.items()}
    is_full = isinstance(masks, Tensor) and masks.dim() == 4
    return own_part(masks, length, start) if is_full else None


def token_mask(
    attention_mask: Any,
    batch: int,
    seen: int,
    length: int,
    device: Any,
    start: int = 0,
    padding: Tensor | None = None,
) -> Tensor:
    """Which tokens of the sequence so far are not padding, read off the mask that the model got.

    Args:
        attention_mask: None, (B, n), a prepared (B, 1, q, n) bool or additive mask, or several of
            them by kind of layer.
        batch: Samples B.
        seen: Tokens in the cache.
        length: Tokens of this forward.
        device: Where to put the result.
        start: Slots before them that a prepared mask was made for.
        padding: (B,) padding at the front of the tokens in the cache, where that is known.

    Returns:
        (B, seen + length) bool.

    Raises:
        ModelStateError: The mask is of a form that does not tell.
    """
    total = seen + length
    if isinstance(attention_mask, Mapping):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values())))
    if attention_mask is None:
        return torch.ones(batch, total, dtype=torch.bool, device=device)
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 4):
        raise ModelStateError(
            f"An attention mask of type {type(attention_mask).__name__} does not tell padding from "
            "tokens; pass the tokenizer's 2-D attention_mask and a dynamic cache."
        )
    tokens = attention_mask.to(device)
    if tokens.dim() == 4:  # some query, itself at least, looks at every token that is no padding
        if start != seen and padding is not None:  # a static cache's, which lacks some
            own = token_mask(own_part(tokens, length, start), batch, 0, length, device)
            past = torch.arange(seen, device=device) >= padding.to(device)[:, None]
            return torch.cat([past, own], 1)
        if start != seen:
            raise ModelStateError(
                f"The attention mask was prepared for {start} cached tokens, but {seen} came and "
                "some were dropped; pass the tokenizer's 2-D attention_mask and a dynamic cache."
            )
        tokens = tokens[:, 0] if tokens.dtype == torch.bool else tokens[:, 0] > -1e4
        tokens = tokens.any(-2)
    tokens = tokens[:, :total].bool().expand(batch, -1)
    if tokens.shape[1] < total:
        raise ModelStateError(
            f"The attention mask covers {tokens.shape[1]} tokens, but {seen} are cached and "
            f"{length} are given; pass a mask over all of them."
        )
    return tokens
