"""LLaVA-1.5, with a tower that has a CLS token and with one that has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cases.base import LAYERS, Case, noise, of
from helpers.models import IMAGE, SIDE, N, tiny_llava, tiny_siglip_llava


class Llava(Case):
    name = "LLaVA-1.5"

    def build(self) -> Any:
        return tiny_llava(layers=LAYERS, tower_layers=4)

    def image_ids(self, image: int) -> list[int]:
        return [IMAGE] * N

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([noise(i, 3, 8 * SIDE, 8 * SIDE) for i in images])}


class LlavaSiglip(Llava):
    """A tower without a CLS token."""

    name = "LLaVA-1.5 with SigLIP"

    def build(self) -> Any:
        return tiny_siglip_llava(layers=LAYERS)


PUBLISHED = {
    "LLaVA-1.5": of("LlavaConfig"),
    "LLaVA-1.5 of several tower layers": of("LlavaConfig", vision_feature_layer=[-2, -5, -8, 7]),
}
