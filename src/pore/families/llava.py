"""LLaVA-1.5 and what shares its shape: a square image, one visual token per patch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pore.families.base import Family
from pore.families.prompts import comes_with, equal_images, placeholder_runs
from pore.layout import Image


class Llava(Family):
    """`LlavaForConditionalGeneration`: CLIP tower, MLP projector, LLaMA-like decoder."""

    name = "LLaVA-1.5"
    model_types = ("llava",)
    tower_refusal = None

    def images(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Image]:
        """Images of a prompt: runs of the image token, `side * side` for each image."""
        if not comes_with(inputs, "image"):
            return []  # a placeholder that a model generated is no image
        config: Any = model.config
        columns = placeholder_runs(inputs["input_ids"], config.image_token_id)
        grid = self.grid(model)
        # With the "full" strategy a CLS token comes first, and tokens lie on no grid.
        full = config.vision_feature_select_strategy == "full"
        extra = int(full and self.tower_has_cls(model))
        size = grid[0] * grid[1] + extra
        return equal_images(columns, size, None if extra else grid)

    def grid(self, model: nn.Module) -> tuple[int, int]:
        """The patch grid of the tower, as for 336 pixels and patches of 14: (24, 24)."""
        vision: Any = model.config.vision_config  # type: ignore[union-attr]
        side = vision.image_size // vision.patch_size
        return side, side
