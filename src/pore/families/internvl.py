"""InternVL: tiles and then the whole image in one run, two by two patches in a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pore.errors import InputError
from pore.families.base import Family, comes_with, placeholder_runs, unbroken
from pore.layout import Image


class InternVL(Family):
    """`InternVLForConditionalGeneration`: InternViT tower, pixel shuffle, MLP projector, decoder.

    An image is its tiles, row by row, and behind them the whole image at low resolution, all in one
    unbroken run between `<img>` and `</img>`. A frame of a video is an image.
    """

    name = "InternVL"
    model_types = ("internvl",)
    tiles = True
    tower_refusal = (
        "every visual token is a square of patches. Use a method that acts on the embeddings or in "
        "the decoder."
    )

    def images(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Image]:
        """Images of a prompt: unbroken runs of the image token."""
        if not comes_with(inputs, "image"):
            return []
        config: Any = model.config
        grid = self.grid(model)
        size = grid[0] * grid[1]
        images = []
        for row, columns in enumerate(placeholder_runs(inputs["input_ids"], config.image_token_id)):
            for index, run in enumerate(unbroken(columns)):
                if len(run) % size:
                    raise InputError(
                        f"Image {index} of sample {row} has {len(run)} visual tokens, which are no "
                        f"whole tiles of {size}; build the inputs with the model's own processor."
                    )
                images.append(Image(row, index, run, grid if len(run) == size else None))
        return images

    def grid(self, model: nn.Module) -> tuple[int, int]:
        """The grid of a tile: its patches, two by two in a token."""
        config: Any = model.config
        vision = config.vision_config
        height, width = (
            int(side // patch * config.downsample_ratio)
            for side, patch in zip(vision.image_size, vision.patch_size, strict=True)
        )
        return height, width
