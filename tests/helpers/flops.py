"""Tiny LLaVAs with several decoders, and how PyTorch counts their FLOPs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

IMAGE = 97
LAYERS = 4
PATCHES = 9
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": 98,
    "pad_token_id": 0,
}


DECODERS = {
    "mha": LlamaConfig(**SIZES),
    "gqa": LlamaConfig(**SIZES, num_key_value_heads=2),
    "wide heads": LlamaConfig(**SIZES, num_key_value_heads=1, head_dim=16),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
}


def tiny_config(text: Any, **changes: Any) -> LlavaConfig:
    """A LLaVA with 3 x 3 patches, for images in which a margin of 2 pixels belongs to no patch."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=26,
        patch_size=8,
    )
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, **changes)


def tiny_model(config: LlavaConfig, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()


def sdpa_on_cpu(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Scores and output over the full square, as PyTorch counts SDPA on other devices.

    `torch.utils.flop_counter` has no formula for the fused kernel on CPUs and counts it as 0.
    """
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])
