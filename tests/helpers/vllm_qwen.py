"""A tiny random Qwen2.5-VL that vLLM's CPU build takes: heads of 32 numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from processors.base import TEMPLATE, tokenizer

TOKEN = 28
"""Pixels along a side of a visual token."""
_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}


def save_qwen(folder: Path) -> Path:
    """Write the checkpoint; its processor needs torchvision.

    Args:
        folder: Where.

    Returns:
        The folder.
    """
    words = tokenizer(*(f"w{i}" for i in range(100)), **_TOKENS)
    size = {"shortest_edge": 4 * TOKEN**2, "longest_edge": 40 * TOKEN**2}
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    processor = transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=14, size=size),
        video_processor=transformers.Qwen2VLVideoProcessor(patch_size=14),
        tokenizer=words,
        chat_template=TEMPLATE % image,
    )
    processor.save_pretrained(folder)
    _model(words).save_pretrained(folder)
    return folder


def _model(words: Any) -> Any:
    ids = {name + "_id": words.convert_tokens_to_ids(token) for name, token in _TOKENS.items()}
    text = {
        "vocab_size": len(words),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 6, 6],
        },
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 1,
    }
    vision = {
        "depth": 2,
        "num_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.2,
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1
    return model.eval()
