"""Processors and models as `pore.families.gemma4` is for."""

from __future__ import annotations

from typing import Any

from processors.base import (
    TEXT,
    TOWER,
    Kind,
    config_of,
    made,
    processor,
    token_id,
    tokenizer,
)

_GEMMA4 = {
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}


def _gemma4() -> Any:
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    images = Gemma4ImageProcessorPil(patch_size=16, max_soft_tokens=280, pooling_kernel_size=3)
    parts = {"feature_extractor": None, "video_processor": None}
    return processor("Gemma4Processor", images, tokenizer(**_GEMMA4), "<|image|>", **parts)


def _gemma4_model(tokens: Any) -> Any:
    kinds = ["full_attention"] * TEXT["num_hidden_layers"]
    sizes = {"head_dim": 8, "global_head_dim": 8, "layer_types": kinds}
    small = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": TEXT["vocab_size"]}
    config = config_of(
        *("Gemma4Config", "Gemma4TextConfig", {**sizes, **small, "num_kv_shared_layers": 0}),
        vision_config={
            "model_type": "gemma4_vision",
            **TOWER,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 16,
            "pooling_kernel_size": 3,
        },
        image_token_id=token_id(tokens, "<|image|>"),
        video_token_id=token_id(tokens, "<|video|>"),
        audio_token_id=token_id(tokens, "<|audio|>"),
        boi_token_id=token_id(tokens, "<|image>"),
        eoi_token_id=token_id(tokens, "<image|>"),
    )
    return made("Gemma4ForConditionalGeneration", config)


KINDS = [
    Kind("Gemma 4", "gemma-4-E4B-it", _gemma4, _gemma4_model),
]
