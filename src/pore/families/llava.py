"""LLaVA-1.5 and what shares its shape: a square image, one visual token per patch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from pore.cost.decoders import DecoderShape
from pore.cost.reading import part
from pore.cost.shapes import ModelShape
from pore.cost.towers import TowerShape, tower_of
from pore.families.base import Family
from pore.families.prompts import equal_images, placeholder_runs
from pore.layout import Image


class Llava(Family):
    """`LlavaForConditionalGeneration`: CLIP tower, MLP projector, LLaMA-like decoder."""

    name = "LLaVA-1.5"
    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    tower_refusal = None

    def still_images(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Image]:
        """Images of a prompt: runs of the image token, `side * side` for each image."""
        config: Any = model.config
        columns = placeholder_runs(inputs["input_ids"], config.image_token_id)
        grid = self.grid(model)
        # With the "full" strategy a CLS token comes first, and tokens lie on no grid.
        full = config.vision_feature_select_strategy == "full"
        extra = int(full and self.tower_has_cls(model))
        size = grid[0] * grid[1] + extra
        return equal_images(columns, size, None if extra else grid)

    def shape(self, config: Any, decoder: DecoderShape) -> ModelShape:
        """LLaVA's projector, and a token for every patch."""
        return llava_shape(config, decoder)

    def grid(self, model: nn.Module) -> tuple[int, int]:
        """The patch grid of the tower, as for 336 pixels and patches of 14: (24, 24)."""
        vision: Any = model.config.vision_config  # type: ignore[union-attr]
        side = vision.image_size // vision.patch_size
        return side, side


def llava_shape(config: Any, decoder: DecoderShape) -> ModelShape:
    """What LLaVA and its successors have in common: square images, a token for every patch."""
    tower = tower_of(config)
    strategy = part(config, "vision_feature_select_strategy")
    tokens = tower.patches if strategy == "default" else tower.tokens
    return ModelShape(decoder, tower, mlp_projector(config, decoder, tower), tokens)


def mlp_projector(config: Any, decoder: DecoderShape, tower: TowerShape) -> int:
    """Multiply-adds of a visual token in two matrices, on one tower layer's features or several."""
    layer = part(config, "vision_feature_layer")
    wide = tower.hidden * (1 if isinstance(layer, int) else len(layer))
    return decoder.hidden * (wide + decoder.hidden)
