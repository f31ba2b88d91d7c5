"""Configs of real models, by their classes, and tiny models of the same classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from pore.checking.twin import build, twin_of


def text(kind: str, **more: Any) -> Any:
    return getattr(transformers, kind)(**more)


def gemma4() -> Any:
    decoder = text("Gemma4TextConfig", num_kv_shared_layers=10, use_double_wide_mlp=True)
    vision = transformers.Gemma4VisionConfig()
    return transformers.Gemma4Config(text_config=decoder, vision_config=vision)


def gemma4_with_experts() -> Any:
    decoder = text(
        "Gemma4TextConfig",
        use_bidirectional_attention="vision",
        attention_k_eq_v=True,
        num_global_key_value_heads=2,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    )
    vision = transformers.Gemma4VisionConfig()
    return transformers.Gemma4Config(text_config=decoder, vision_config=vision)


def of(name: str, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**more)


MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
# As large as their classes make them, or as a published checkpoint where that says more.
FULL: dict[str, Callable[[], Any]] = {
    "LLaVA-1.5": of("LlavaConfig"),
    "LLaVA-1.5 of several tower layers": of("LlavaConfig", vision_feature_layer=[-2, -5, -8, 7]),
    "LLaVA-NeXT": of("LlavaNextConfig"),
    "LLaVA-NeXT with Mistral": lambda: transformers.LlavaNextConfig(
        text_config=text("MistralConfig", sliding_window=4096)
    ),
    "LLaVA-OneVision": of("LlavaOnevisionConfig"),
    "LLaVA-NeXT-Video": of("LlavaNextVideoConfig"),
    "Video-LLaVA": of("VideoLlavaConfig"),
    "Qwen2-VL": of("Qwen2VLConfig"),
    "Qwen2.5-VL": of("Qwen2_5_VLConfig"),
    "Qwen2.5-VL with sections": of("Qwen2_5_VLConfig", text_config={"rope_parameters": MROPE}),
    "Qwen3-VL": of("Qwen3VLConfig"),
    "Qwen3-VL-MoE": of("Qwen3VLMoeConfig"),
    "Qwen3.5": of("Qwen3_5Config"),
    "Qwen3.5-MoE": of("Qwen3_5MoeConfig"),
    "GLM-4V": of("Glm4vConfig"),
    "GLM-4.5V": of("Glm4vMoeConfig"),
    "GLM-4.6V": of("Glm46VConfig"),
    "GLM-OCR": of("GlmOcrConfig"),
    "InternVL": of("InternVLConfig"),
    "Llama 4": of("Llama4Config"),
    "SmolVLM": of("SmolVLMConfig"),
    "SmolVLM with a wide shuffle": of("SmolVLMConfig", scale_factor=4),
    "Idefics3": of("Idefics3Config"),
    "Gemma 3": of("Gemma3Config"),
    "Aya Vision": of("AyaVisionConfig"),
    "Command A Vision": of("Cohere2VisionConfig"),
    "Mistral 3": of("Mistral3Config"),
    "Ministral 3": lambda: transformers.Mistral3Config(text_config=text("Ministral3Config")),
    "Mistral 4": lambda: transformers.Mistral3Config(text_config=text("Mistral4Config")),
    "Pixtral": lambda: transformers.LlavaConfig(
        text_config=text("MistralConfig", sliding_window=None),
        vision_config=transformers.PixtralVisionConfig(),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    "LightOnOCR": of("LightOnOcrConfig"),
    "PaliGemma": of("PaliGemmaConfig"),
    "PaliGemma 2": lambda: transformers.PaliGemmaConfig(text_config=text("Gemma2Config")),
    "Gemma 4": gemma4,
    "Gemma 4 with experts": gemma4_with_experts,
    "Gemma 4 Unified": lambda: transformers.Gemma4UnifiedConfig(
        vision_config=transformers.Gemma4UnifiedVisionConfig()
    ),
}


def stand_in(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    """A model of a config's classes that is small enough to be made."""
    kind = transformers.AutoModelForImageTextToText._model_mapping[type(config)]
    return build(twin_of(config)[0], kind, dtype, config)
