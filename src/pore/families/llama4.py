"""Llama 4: tiles with separators between them, and then the whole image; mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pore.errors import InputError
from pore.families.base import Family, comes_with, placeholder_runs
from pore.layout import Image


class Llama4(Family):
    """`Llama4ForConditionalGeneration`: ViT tower, pixel shuffle, decoder of experts.

    Between `<|image_start|>` and `<|image_end|>` an image is its tiles, row by row, with separators
    behind them, and the whole image at low resolution; separators are structure. Layers without
    rotary positions scale queries by how many tokens there are before them, in steps of
    `floor_scale` (8192): they count those that are left.
    """

    name = "Llama 4"
    model_types = ("llama4",)
    tiles = True
    tower_refusal = (
        "every visual token is a square of patches. Use a method that acts on the embeddings or in "
        "the decoder."
    )

    def decoder(self, model: nn.Module) -> nn.Module:
        """The language model, which has its head one level further up."""
        with_head: Any = self.base(model).language_model
        return with_head.model  # type: ignore[no-any-return]

    def tower(self, model: nn.Module) -> nn.Module:
        """The vision tower."""
        return self.base(model).vision_model  # type: ignore[return-value]

    def images(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Image]:
        """Images of a prompt: the image tokens behind every start token."""
        if not comes_with(inputs, "image"):
            return []
        config: Any = model.config
        ids, grid = inputs["input_ids"], self.grid(model)
        starts = (ids == config.boi_token_id).cumsum(1).tolist()
        images = []
        for row, columns in enumerate(placeholder_runs(ids, config.image_token_id)):
            groups: dict[int, list[int]] = {}
            for column in columns:
                groups.setdefault(starts[row][column], []).append(column)
            for index, found in enumerate(groups.values()):
                if len(found) % (grid[0] * grid[1]):
                    raise InputError(
                        f"Image {index} of sample {row} has {len(found)} visual tokens, which are "
                        f"no whole tiles of {grid[0] * grid[1]}; build the inputs with the model's "
                        "own processor."
                    )
                structure = sorted(set(range(found[0], found[-1] + 1)) - set(found))
                one = grid if len(found) == grid[0] * grid[1] else None
                images.append(Image(row, index, found, one, structure=structure))
        return images

    def grid(self, model: nn.Module) -> tuple[int, int]:
        """The grid of a tile: its patches, two by two in a token."""
        config: Any = model.config
        vision = config.vision_config
        side = int(vision.image_size // vision.patch_size * vision.pixel_shuffle_ratio)
        return side, side
