"""A tiny random LLaVA-NeXT for vLLM's CPU build: heads of 32 numbers, tiles of 16 patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from processors.base import TEMPLATE, tokenizer

SIDE = 56
"""Pixels along a side of a tile."""


def save_next(folder: Path) -> Path:
    """Write the checkpoint; its processor needs torchvision.

    Args:
        folder: Where.

    Returns:
        The folder.
    """
    words = tokenizer(*(f"w{i}" for i in range(100)), image_token="<image>")
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    processor = transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessor(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=pinpoints,
        ),
        tokenizer=words,
        chat_template=TEMPLATE % "<image>",
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    text: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": len(words),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 1,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 14,
        "projection_dim": 32,
        "initializer_range": 0.2,
    }
    config = transformers.LlavaNextConfig(
        text_config=text,
        vision_config=vision,
        image_grid_pinpoints=pinpoints,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = transformers.LlavaNextForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1
    model.eval().save_pretrained(folder)
    return folder
