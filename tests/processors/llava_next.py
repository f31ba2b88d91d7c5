"""Processors and models as `pore.families.llava_next` is for."""

from __future__ import annotations

from typing import Any

from processors.base import Kind, clip, config_of, llava_tokens, made, processor, siglip, token_id


def _next(kind: str) -> Any:
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    more: dict[str, Any] = {"patch_size": 14, "vision_feature_select_strategy": "default"}
    more |= {"num_additional_image_tokens": 1}
    more |= {"video_processor": None} if "Video" in kind else {}
    return processor(f"{kind}Processor", images, llava_tokens(), "<image>", **more)


def _next_model(kind: str, tokens: Any) -> Any:
    config = config_of(
        *(f"{kind}Config", "LlamaConfig"),
        vision_config=clip(),
        vision_feature_layer=-1,
        image_token_index=token_id(tokens, "<image>"),
        video_token_index=token_id(tokens, "<video>"),
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    )
    return made(f"{kind}ForConditionalGeneration", config)


def _onevision() -> Any:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    more: dict[str, Any] = {"num_image_tokens": 729, "vision_feature_select_strategy": "full"}
    return processor(
        *("LlavaOnevisionProcessor", LlavaOnevisionImageProcessorPil(), llava_tokens()),
        *("<image>",),
        video_processor=None,
        **more,
    )


def _onevision_model(tokens: Any) -> Any:
    config = config_of(
        *("LlavaOnevisionConfig", "Qwen2Config"),
        vision_config=siglip(),
        vision_feature_layer=-1,
        image_token_index=token_id(tokens, "<image>"),
        video_token_index=token_id(tokens, "<video>"),
    )
    return made("LlavaOnevisionForConditionalGeneration", config)


KINDS = [
    Kind(
        *("LLaVA-NeXT", "llava-v1.6-vicuna-7b"),
        lambda: _next("LlavaNext"),
        lambda tokens: _next_model("LlavaNext", tokens),
    ),
    Kind(
        *("LLaVA-NeXT-Video", "LLaVA-NeXT-Video-7B"),
        lambda: _next("LlavaNextVideo"),
        lambda tokens: _next_model("LlavaNextVideo", tokens),
    ),
    Kind("LLaVA-OneVision", "llava-onevision-qwen2-7b-ov", _onevision, _onevision_model),
]
