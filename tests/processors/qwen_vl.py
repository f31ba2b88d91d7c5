"""Processors and models as `pore.families.qwen_vl` is for."""

from __future__ import annotations

from typing import Any

from processors.base import Kind, config_of, made, processor, token_id, tokenizer

_QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}


def _qwen(kind: str, patch: int, least: int, most: int) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil(
        patch_size=patch, size={"shortest_edge": least, "longest_edge": most}
    )
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return processor(kind, images, tokenizer(**_QWEN), image, video_processor=None)


def _qwen_model(kind: str, text: str, tower: dict[str, Any], tokens: Any, **sizes: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = config_of(
        *(f"{kind}Config", text, {"rope_parameters": rope, **sizes}),
        vision_config={"depth": 0, "num_heads": 2, "spatial_merge_size": 2, **tower},
        image_token_id=token_id(tokens, "<|image_pad|>"),
        video_token_id=token_id(tokens, "<|video_pad|>"),
        vision_start_token_id=token_id(tokens, "<|vision_start|>"),
        vision_end_token_id=token_id(tokens, "<|vision_end|>"),
    )
    return made(f"{kind}ForConditionalGeneration", config)


_QWEN2 = {"embed_dim": 16, "hidden_size": 16, "mlp_ratio": 1, "patch_size": 14}


_QWEN25 = {
    "hidden_size": 16,
    "out_hidden_size": 16,
    "intermediate_size": 16,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [],
}


_QWEN3 = {
    "hidden_size": 16,
    "out_hidden_size": 16,
    "intermediate_size": 16,
    "patch_size": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [],
}


_QWEN35 = {k: v for k, v in _QWEN3.items() if k[:9] != "deepstack"}


_QWEN35_TEXT = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["full_attention"] * 2,
}


_RATIO = "absolute aspect ratio must be smaller than 200"


THIN = {"one pixel high": _RATIO}


KINDS = [
    Kind(
        *("Qwen2-VL", "Qwen2-VL-7B-Instruct"),
        lambda: _qwen("Qwen2VLProcessor", 14, 3136, 12845056),
        lambda tokens: _qwen_model("Qwen2VL", "Qwen2VLTextConfig", _QWEN2, tokens),
        refuses=THIN,
    ),
    Kind(
        *("Qwen2.5-VL", "Qwen2.5-VL-7B-Instruct"),
        lambda: _qwen("Qwen2_5_VLProcessor", 14, 3136, 12845056),
        lambda tokens: _qwen_model("Qwen2_5_VL", "Qwen2_5_VLTextConfig", _QWEN25, tokens),
        refuses=THIN,
    ),
    Kind(
        *("Qwen3-VL", "Qwen3-VL-8B-Instruct"),
        lambda: _qwen("Qwen3VLProcessor", 16, 65536, 16777216),
        lambda tokens: _qwen_model("Qwen3VL", "Qwen3VLTextConfig", _QWEN3, tokens),
        refuses=THIN,
    ),
    Kind(
        *("Qwen3.5", "Qwen3.5"),
        lambda: _qwen("Qwen3VLProcessor", 16, 65536, 16777216),
        lambda tokens: _qwen_model("Qwen3_5", "Qwen3_5TextConfig", _QWEN35, tokens, **_QWEN35_TEXT),
        refuses=THIN,
    ),
]
