"""Processors and models as `pore.families.paligemma` is for."""

from __future__ import annotations

from typing import Any

from processors.base import Kind, config_of, made, processor, siglip, token_id, tokenizer


def _paligemma() -> Any:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images: Any = SiglipImageProcessorPil(size={"height": 448, "width": 448})
    images.image_seq_length = 1024
    return processor("PaliGemmaProcessor", images, tokenizer(image_token="<image>"), "<image>")


def _paligemma_model(tokens: Any) -> Any:
    config = config_of(
        *("PaliGemmaConfig", "GemmaConfig", {"head_dim": 8}),
        vision_config=siglip(448, 14),
        projection_dim=16,
        image_token_index=token_id(tokens, "<image>"),
    )
    return made("PaliGemmaForConditionalGeneration", config)


KINDS = [
    Kind("PaliGemma", "paligemma2-3b-mix-448", _paligemma, _paligemma_model),
]
