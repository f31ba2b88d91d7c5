"""Processors and models as `pore.families.internvl` is for."""

from __future__ import annotations

from typing import Any

from processors.base import TOWER, Kind, config_of, made, processor, token_id, tokenizer


def _internvl() -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    images = GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448}, crop_to_patches=True, min_patches=1, max_patches=12
    )
    tokens = tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    more: dict[str, Any] = {"image_seq_length": 256, "video_processor": None}
    return processor("InternVLProcessor", images, tokens, "<IMG_CONTEXT>", **more)


def _internvl_model(tokens: Any) -> Any:
    config = config_of(
        *("InternVLConfig", "Qwen2Config"),
        vision_config={**TOWER, "image_size": 448, "patch_size": 14},
        image_token_id=token_id(tokens, "<IMG_CONTEXT>"),
        image_seq_length=256,
    )
    return made("InternVLForConditionalGeneration", config)


KINDS = [
    Kind("InternVL", "InternVL3-8B-hf", _internvl, _internvl_model),
]
