"""Processors and models as `pore.families.llava` is for."""

from __future__ import annotations

from typing import Any

from processors.base import Kind, clip, config_of, llava_tokens, made, processor, siglip, token_id


def _llava(pad: bool) -> Any:
    settings = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    images: Any
    if pad:  # as LLaVA-1.5 was trained
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        images = LlavaImageProcessorPil(do_pad=True, **settings)
    else:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        images = CLIPImageProcessorPil(**settings)
    more = {"patch_size": 14, "vision_feature_select_strategy": "default"}
    more["num_additional_image_tokens"] = 1
    return processor("LlavaProcessor", images, llava_tokens(), "<image>", **more)


def _llava_model(tokens: Any) -> Any:
    config = config_of(
        *("LlavaConfig", "LlamaConfig"),
        vision_config=clip(),
        vision_feature_layer=-1,
        image_token_index=token_id(tokens, "<image>"),
    )
    return made("LlavaForConditionalGeneration", config)


def _llava_siglip() -> Any:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(size={"height": 384, "width": 384})
    more: dict[str, Any] = {"patch_size": 14, "vision_feature_select_strategy": "full"}
    return processor("LlavaProcessor", images, llava_tokens(), "<image>", **more)


def _llava_siglip_model(tokens: Any) -> Any:
    config = config_of(
        *("LlavaConfig", "Qwen2Config"),
        vision_config=siglip(),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=token_id(tokens, "<image>"),
    )
    return made("LlavaForConditionalGeneration", config)


KINDS = [
    Kind("LLaVA-1.5", "llava-1.5-7b", lambda: _llava(False), _llava_model),
    Kind("LLaVA-1.5, letterboxed", "llava-v1.5-7b", lambda: _llava(True), _llava_model),
    Kind("LLaVA with SigLIP", "llava-interleave-qwen", _llava_siglip, _llava_siglip_model),
]
