"""Processors and models as `pore.families.glm4v` is for."""

from __future__ import annotations

from typing import Any

from processors.base import Kind, config_of, made, processor, token_id, tokenizer
from processors.qwen_vl import THIN

_GLM = {
    "image_token": "<|image|>",
    "video_token": "<|video|>",
    "video_start_token": "<|begin_of_video|>",
    "video_end_token": "<|end_of_video|>",
    "image_start_token": "<|begin_of_image|>",
    "image_end_token": "<|end_of_image|>",
}


def _glm(kind: str) -> Any:
    images: Any
    if kind == "Glm4v":
        from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

        images = Glm4vImageProcessorPil()
    else:
        from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

        images = Glm46VImageProcessorPil()
    image = "<|begin_of_image|><|image|><|end_of_image|>"
    return processor(f"{kind}Processor", images, tokenizer(**_GLM), image, video_processor=None)


def _glm_model(kind: str, tokens: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = config_of(
        *(f"{kind}Config", "Glm4vTextConfig", {"rope_parameters": rope}),
        vision_config={
            "depth": 0,
            "hidden_size": 16,
            "out_hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "image_size": 336,
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
        image_token_id=token_id(tokens, "<|image|>"),
        video_token_id=token_id(tokens, "<|video|>"),
        image_start_token_id=token_id(tokens, "<|begin_of_image|>"),
        image_end_token_id=token_id(tokens, "<|end_of_image|>"),
        video_start_token_id=token_id(tokens, "<|begin_of_video|>"),
        video_end_token_id=token_id(tokens, "<|end_of_video|>"),
    )
    return made(f"{kind}ForConditionalGeneration", config)


KINDS = [
    Kind(
        *("GLM-4V", "GLM-4.1V-9B-Thinking"),
        lambda: _glm("Glm4v"),
        lambda tokens: _glm_model("Glm4v", tokens),
        refuses=THIN,
    ),
    Kind(
        *("GLM-4.6V", "GLM-4.6V"),
        lambda: _glm("Glm46V"),
        lambda tokens: _glm_model("Glm46V", tokens),
        refuses=THIN,
    ),
]
