"""SmolVLM and Idefics3: tagged tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from cases.base import TOWER, Case, noise, of, text_config
from helpers.models import IMAGE, in_float64


class SmolVLM(Case):
    """Image 0 is two tiles and the whole view, image 1 the whole view alone."""

    name = "SmolVLM"
    config, kind = "SmolVLMConfig", "SmolVLMForConditionalGeneration"
    tiled = True

    def build(self) -> Any:
        config = getattr(transformers, self.config)(
            text_config=text_config("LlamaConfig").to_dict(),
            vision_config=TOWER,
            scale_factor=2,
            image_token_id=IMAGE,
        )
        kind = getattr(transformers, self.kind)
        return in_float64(kind._from_config(config, dtype=torch.float64))

    def image_ids(self, image: int) -> list[int]:
        fake, whole, newline = 91, 92, 93
        tile = [IMAGE] * 16
        single = [fake, whole, *tile, fake]
        return single if image % 2 else [fake, 94, *tile, fake, 95, *tile, newline, *single]

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        tiles = [noise(10 * i + k, 3, 32, 32) for i in images for k in range(1 if i % 2 else 3)]
        return {"pixel_values": torch.stack(tiles)}

    def inputs(self, prompts: Sequence[Sequence[int]], side: str = "left") -> dict[str, Tensor]:
        """Tiles are given by sample, filled up with zeros."""
        found = super().inputs(prompts, side)
        if "pixel_values" in found:
            tiles = found["input_ids"].eq(IMAGE).sum(1) // 16
            of_sample = found["pixel_values"].split(tiles.tolist())
            found["pixel_values"] = nn.utils.rnn.pad_sequence(of_sample, batch_first=True)
        return found


class Idefics3(SmolVLM):
    name = "Idefics3"
    cousin = True
    config, kind = "Idefics3Config", "Idefics3ForConditionalGeneration"


PUBLISHED = {
    "SmolVLM": of("SmolVLMConfig"),
    "SmolVLM with a wide shuffle": of("SmolVLMConfig", scale_factor=4),
    "Idefics3": of("Idefics3Config"),
}
