"""InternVL: tiles and then the whole image in one run, two by two patches in a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pore.cost.decoders import DecoderShape
from pore.cost.shapes import ModelShape
from pore.cost.towers import tower_of
from pore.families.base import TAG, Family, Noise
from pore.families.prompts import placeholder_runs, tiled_image, unbroken
from pore.layout import Image


class InternVL(Family):
    """`InternVLForConditionalGeneration`: InternViT tower, pixel shuffle, MLP projector, decoder.

    An image is its tiles, row by row, and after them the whole image at low resolution, all in one
    unbroken run between `<img>` and `</img>`. A frame of a video is an image.
    """

    name = "InternVL"
    model_types = ("internvl",)
    tiles = True
    tower_refusal = None
    tiled_prompts = True
    tiles_placed = False
    merged = True

    def tower_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """All layers of the vision tower."""
        tower: Any = self.tower(model)
        return tower.encoder.layer  # type: ignore[no-any-return]

    def tower_attention(self, layer: nn.Module) -> nn.Module:
        """The self-attention module of a layer of the vision tower."""
        return layer.attention  # type: ignore[return-value]

    def tower_has_cls(self, model: nn.Module) -> bool:
        """InternViT has a CLS token."""
        return True

    def merge_size(self, model: nn.Module) -> int:
        """Usually 2: the pixel shuffle before the projector makes one token from 2 x 2 patches."""
        config: Any = model.config
        return int(1 / config.downsample_ratio)

    def still_images(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Image]:
        """Images of a prompt: unbroken runs of the image token."""
        rows = placeholder_runs(inputs["input_ids"], self.placeholder_id(model))
        return [
            tiled_image(row, index, run, self.grid(model))
            for row, columns in enumerate(rows)
            for index, run in enumerate(unbroken(columns))
        ]

    def example(self, model: nn.Module, noise: Noise) -> tuple[list[int], dict[str, Tensor]]:
        """One image of two tiles and the whole view."""
        config: Any = model.config
        height, width = self.grid(model)
        ids = [TAG, *[config.image_token_id] * (3 * height * width), TAG + 1]
        return ids, {"pixel_values": noise(3, 3, *config.vision_config.image_size)}

    def shape(self, config: Any, decoder: DecoderShape) -> ModelShape:
        """Two matrices on squares of patches."""
        tower, merge, out = tower_of(config), round(1 / config.downsample_ratio), decoder.hidden
        projector = out * (tower.hidden * merge**2 + out)
        return ModelShape.of_tiles(decoder, tower, projector, merge)

    def grid(self, model: nn.Module) -> tuple[int, int]:
        """The grid of a tile: its patches, two by two in a token."""
        config: Any = model.config
        vision = config.vision_config
        height, width = (
            int(side // patch * config.downsample_ratio)
            for side, patch in zip(vision.image_size, vision.patch_size, strict=True)
        )
        return height, width
