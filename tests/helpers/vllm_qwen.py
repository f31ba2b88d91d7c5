"""A tiny random Qwen2.5-VL or Qwen3-VL that vLLM's CPU build takes: heads of 32 numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from processors.base import TEMPLATE, tokenizer

_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}


_VISION = {
    "depth": 2,
    "num_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.2,
}
_VISIONS = {
    "Qwen2_5_VL": {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
    "Qwen3VL": {
        "patch_size": 16,
        "depth": 4,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 2],
    },
}


def token_side(kind: str) -> int:
    """Pixels along a side of a visual token."""
    return 2 * int(_VISIONS[kind]["patch_size"])  # type: ignore[call-overload]


def save_qwen(folder: Path, kind: str) -> Path:
    """Write the checkpoint; its processor needs torchvision.

    Args:
        folder: Where.
        kind: "Qwen2_5_VL" or "Qwen3VL".

    Returns:
        The folder.
    """
    words = tokenizer(*(f"w{i}" for i in range(100)), **_TOKENS)
    side = token_side(kind)
    size = {"shortest_edge": 4 * side**2, "longest_edge": 40 * side**2}
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    of_videos = "Qwen3VLVideoProcessor" if kind == "Qwen3VL" else "Qwen2VLVideoProcessor"
    processor = getattr(transformers, f"{kind}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=side // 2, size=size),
        video_processor=getattr(transformers, of_videos)(patch_size=side // 2),
        tokenizer=words,
        chat_template=TEMPLATE % image,
    )
    processor.save_pretrained(folder)
    _model(kind, words).save_pretrained(folder)
    return folder


def _model(kind: str, words: Any) -> Any:
    ids = {name + "_id": words.convert_tokens_to_ids(token) for name, token in _TOKENS.items()}
    text = {
        "vocab_size": len(words),
        "hidden_size": 64,
        "head_dim": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": kind == "Qwen3VL",  # vLLM asks; transformers knows by the model
        },
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 1,
    }
    vision = {**_VISION, **_VISIONS[kind]}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **ids)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1
    return model.eval()
