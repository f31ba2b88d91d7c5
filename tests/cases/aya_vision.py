"""Aya Vision and Command A Vision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from cases.base import LAYERS, TOWER, Case, noise, of, since, text_config
from helpers.models import IMAGE


class AyaVision(Case):
    """Image 0 is two tiles and the whole view, image 1 the whole view alone; sliding windows."""

    name = "Aya Vision"
    tiled = True
    beams = since("5.18")  # before, it repeated tiles one by one, and mixed images up
    config, kind = "AyaVisionConfig", "AyaVisionForConditionalGeneration"
    more: dict[str, Any] = {"image_token_index": IMAGE}  # noqa: RUF012

    def build(self) -> Any:
        kinds = ["sliding_attention", "sliding_attention", "full_attention"] * (LAYERS // 3)
        config = getattr(transformers, self.config)(
            text_config=text_config(
                "Cohere2Config", sliding_window=32, layer_types=kinds, logit_scale=1.0
            ).to_dict(),
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER},
            **self.more,
        )
        return getattr(transformers, self.kind)._from_config(config, dtype=torch.float64)

    def image_ids(self, image: int) -> list[int]:
        tile = [IMAGE] * 16
        tiles = [] if image % 2 else [103, *tile, 104, *tile]
        return [101, *tiles, 105, *tile, 102]

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        tiles = [noise(10 * i + k, 3, 32, 32) for i in images for k in range(1 if i % 2 else 3)]
        return {"pixel_values": torch.stack(tiles)}


class Cohere2Vision(AyaVision):
    """A line break after every tile."""

    name = "Command A Vision"
    cousin = True
    config, kind = "Cohere2VisionConfig", "Cohere2VisionForConditionalGeneration"
    more: dict[str, Any] = {  # noqa: RUF012
        "image_token_id": IMAGE,
        "alignment_intermediate_size": 32,
    }

    def image_ids(self, image: int) -> list[int]:
        tiles = [*[IMAGE] * 16, 103] * (1 if image % 2 else 3)
        return [101, *tiles, 102]


PUBLISHED = {
    "Aya Vision": of("AyaVisionConfig"),
    "Command A Vision": of("Cohere2VisionConfig"),
}
