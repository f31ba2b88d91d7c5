"""Processors and models as `pore.families.aya_vision` is for."""

from __future__ import annotations

from typing import Any

from processors.base import Kind, config_of, made, processor, siglip, token_id, tokenizer


def _aya() -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    images = GotOcr2ImageProcessorPil(
        size={"height": 364, "width": 364}, crop_to_patches=True, min_patches=1, max_patches=12
    )
    marks = ("<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>")
    tiles = [f"TILE_{i}" for i in (*range(1, 13), "GLOBAL")]
    tokens = tokenizer(*marks, "TILE", *tiles, image_token="<image>")
    more: dict[str, Any] = {"patch_size": 28, "img_size": 364}
    return processor("AyaVisionProcessor", images, tokens, "<image>", **more)


def _aya_model(tokens: Any) -> Any:
    config = config_of(
        *("AyaVisionConfig", "Cohere2Config"),
        vision_config=siglip(364, 14),
        vision_feature_layer=-1,
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
        alignment_intermediate_size=32,
        image_token_index=token_id(tokens, "<|IMG_PATCH|>"),
    )
    return made("AyaVisionForConditionalGeneration", config)


KINDS = [
    Kind("Aya Vision", "aya-vision-8b", _aya, _aya_model),
]
