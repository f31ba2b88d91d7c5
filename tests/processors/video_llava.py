"""Processors and models as `pore.families.video_llava` is for."""

from __future__ import annotations

from typing import Any

import transformers

from processors.base import Kind, clip, config_of, llava_tokens, made, processor, token_id


def _video_llava() -> Any:
    images = transformers.VideoLlavaImageProcessor()
    more: dict[str, Any] = {"patch_size": 14, "vision_feature_select_strategy": "default"}
    more |= {"num_additional_image_tokens": 1, "video_processor": None}
    return processor("VideoLlavaProcessor", images, llava_tokens(), "<image>", **more)


def _video_llava_model(tokens: Any) -> Any:
    config = config_of(
        *("VideoLlavaConfig", "LlamaConfig"),
        vision_config=clip(224),
        vision_feature_layer=-1,
        image_token_index=token_id(tokens, "<image>"),
        video_token_index=token_id(tokens, "<video>"),
    )
    return made("VideoLlavaForConditionalGeneration", config)


KINDS = [
    Kind(
        *("Video-LLaVA", "Video-LLaVA-7B-hf", _video_llava, _video_llava_model),
        refuses=dict.fromkeys(("one pixel high", "one pixel"), "mean must have 1 elements"),
    ),
]
