"""Processors and models as `pore.families.llama4` is for."""

from __future__ import annotations

from typing import Any

import transformers

from processors.base import TOWER, Kind, config_of, made, processor, token_id, tokenizer

_LLAMA4 = (
    "<|image|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
)


def _llama4() -> Any:
    images = transformers.Llama4ImageProcessor(max_patches=16)
    return processor("Llama4Processor", images, tokenizer(*_LLAMA4), "<|image|>", patch_size=14)


def _llama4_model(tokens: Any) -> Any:
    config = config_of(
        *("Llama4Config", "Llama4TextConfig"),
        {"head_dim": 8, "intermediate_size_mlp": 16, "num_local_experts": 2},
        vision_config={
            **TOWER,
            "intermediate_size": 64,
            "image_size": 336,
            "patch_size": 14,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        boi_token_index=token_id(tokens, "<|image_start|>"),
        eoi_token_index=token_id(tokens, "<|image_end|>"),
        image_token_index=token_id(tokens, "<|patch|>"),
    )
    return made("Llama4ForConditionalGeneration", config)


KINDS = [
    Kind("Llama 4", "Llama-4-Scout-17B-16E-Instruct", _llama4, _llama4_model),
]
