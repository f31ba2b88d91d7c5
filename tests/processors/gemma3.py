"""Processors and models as `pore.families.gemma3` is for."""

from __future__ import annotations

from typing import Any

from processors.base import Kind, config_of, made, processor, siglip, token_id, tokenizer

_GEMMA = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}


def _gemma3() -> Any:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    images = Gemma3ImageProcessorPil(
        size={"height": 896, "width": 896},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        pan_and_scan_min_crop_size=256,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    tokens = tokenizer(**_GEMMA)
    more: dict[str, Any] = {"image_seq_length": 256}
    return processor("Gemma3Processor", images, tokens, "<start_of_image>", **more)


def _gemma3_model(tokens: Any) -> Any:
    config = config_of(
        *("Gemma3Config", "Gemma3TextConfig"),
        {"head_dim": 8, "layer_types": ["full_attention"] * 2},
        vision_config=siglip(896, 14),
        mm_tokens_per_image=256,
        image_token_index=token_id(tokens, "<image_soft_token>"),
        boi_token_index=token_id(tokens, "<start_of_image>"),
        eoi_token_index=token_id(tokens, "<end_of_image>"),
    )
    return made("Gemma3ForConditionalGeneration", config)


KINDS = [
    Kind("Gemma 3", "gemma-3-4b-it", _gemma3, _gemma3_model),
    Kind(
        *("Gemma 3, pan and scan", "gemma-3-4b-it", _gemma3, _gemma3_model),
        kwargs={"do_pan_and_scan": True},
    ),
]
