"""A family that a user describes, and its model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cases.base import Case, noise, text_config
from helpers.unknown import PATCH, my_vlm


class Described(Case):
    """The adapter of an unknown model with images of 4 x 4 tokens."""

    name = "My VLM"

    def build(self) -> Any:
        return my_vlm(text_config("LlamaConfig"))

    def image_ids(self, image: int) -> list[int]:
        return [100] * 16

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([noise(i, 3, 4 * PATCH, 4 * PATCH) for i in images])}
