"""Masks are what `pore._compat.masks` says."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig

from helpers.models import tiny_llava
from pore._compat.attention import with_attention
from pore._compat.masks import block_masks, causal_mask


def test_masks_are_causal_and_hide_padding() -> None:
    """`ALL_MASK_ATTENTION_FUNCTIONS` and `causal_mask_function` of `masking_utils`."""
    config = tiny_llava(attention="sdpa").model.language_model.config
    hidden = torch.zeros(1, 3, 8)
    valid = torch.tensor([[False, True, True, True, True]])
    mask = causal_mask(hidden, valid, config=config, length=3, offset=2)
    causal = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(mask, causal[None, None])

    def near(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (q - k < 2)

    mask = causal_mask(hidden, valid, config=config, length=3, offset=2, see=near)
    band = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(mask, band[None, None])
    flash = with_attention(config, "flash_attention_2")
    mask = causal_mask(hidden, valid, config=flash, length=3, offset=2)
    assert torch.equal(mask.bool(), valid)


def test_tokens_of_a_block_see_each_other() -> None:
    """`masking_utils.create_masks_for_generate(block_sequence_ids=)`."""
    config = LlamaConfig(attn_implementation="sdpa")
    tokens, blocks = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[-1, 0, 0, -1]])
    mask = block_masks(config, torch.zeros(1, 4, 8), tokens, None, blocks)
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    causal[1, 2] = True
    assert torch.equal(mask[0, 0], causal)
