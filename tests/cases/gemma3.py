"""Gemma 3: tokens of an image see each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from cases.base import LAYERS, TOWER, Case, noise, of, since, text_config


class Gemma3(Case):
    """With prompts longer than the sliding window, which still shows some of every image."""

    name = "Gemma 3"
    static = since("5.20")

    def build(self) -> Any:
        kinds = ["sliding_attention", "sliding_attention", "full_attention"] * (LAYERS // 3)
        config = transformers.Gemma3Config(
            text_config=text_config(
                "Gemma3TextConfig",
                head_dim=8,
                query_pre_attn_scalar=8,
                sliding_window=32,
                layer_types=kinds,
            ).to_dict(),
            vision_config={"model_type": "siglip_vision_model", **TOWER},
            mm_tokens_per_image=16,
            image_token_index=100,
            boi_token_index=101,
            eoi_token_index=102,
        )
        kind = transformers.Gemma3ForConditionalGeneration
        model = kind._from_config(config, dtype=torch.float64)
        nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
        return model

    def image_ids(self, image: int) -> list[int]:
        return [101, *[100] * 16, 102]

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([noise(i, 3, 32, 32) for i in images])}

    def extra(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": (ids == 100).int()}


PUBLISHED = {
    "Gemma 3": of("Gemma3Config"),
}
