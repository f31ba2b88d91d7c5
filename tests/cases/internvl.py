"""InternVL: tiles and the whole view in one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from cases.base import Case, noise, of, since, text_config
from helpers.models import IMAGE


class InternVL(Case):
    """Image 0 is two tiles and the whole view, image 1 the whole view alone."""

    name = "InternVL"
    beams = since("5.18")  # before, it repeated tiles one by one, and mixed images up
    tiled = True

    def build(self) -> Any:
        tower = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "initializer_range": 0.3,
        }
        config = transformers.InternVLConfig(
            text_config=text_config("Qwen2Config").to_dict(),
            vision_config=tower,
            image_token_id=IMAGE,
            image_seq_length=16,
        )
        kind = transformers.InternVLForConditionalGeneration
        return kind._from_config(config, dtype=torch.float64)

    def image_ids(self, image: int) -> list[int]:
        return [91, *[IMAGE] * (16 if image % 2 else 48), 92]

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        tiles = [noise(10 * i + k, 3, 32, 32) for i in images for k in range(1 if i % 2 else 3)]
        return {"pixel_values": torch.stack(tiles)}


PUBLISHED = {
    "InternVL": of("InternVLConfig"),
}
