"""Llama 4: tiles with separators between them, and then the whole image; mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pore.cost.decoders import DecoderShape
from pore.cost.reading import size
from pore.cost.shapes import ModelShape
from pore.cost.towers import tower_of
from pore.families.base import TAG, Family, Noise
from pore.families.prompts import placeholder_runs, tiled_image, tiles_apart
from pore.layout import Image, Tiling


class Llama4(Family):
    """`Llama4ForConditionalGeneration`: ViT tower, pixel shuffle, decoder of experts.

    Between `<|image_start|>` and `<|image_end|>` an image is its tiles, row by row, with separators
    after them, and the whole image at low resolution; separators are structure. Layers without
    rotary positions scale queries by the number of tokens before them, in steps of `floor_scale`
    (8192); only tokens that are left count there.
    """

    name = "Llama 4"
    model_types = ("llama4",)
    tiles = True
    tower_refusal = None
    tiled_prompts = True
    cls_first = False
    merged = True

    def decoder(self, model: nn.Module) -> nn.Module:
        """The language model, which has its head one level further up."""
        with_head: Any = self.base(model).language_model
        return with_head.model  # type: ignore[no-any-return]

    def tower(self, model: nn.Module) -> nn.Module:
        """The vision tower."""
        return self.base(model).vision_model  # type: ignore[return-value]

    def tower_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """All layers of the vision tower."""
        tower: Any = self.tower(model)
        return tower.model.layers  # type: ignore[no-any-return]

    def tower_has_cls(self, model: nn.Module) -> bool:
        """There is a CLS token, after the patches."""
        return True

    def token_features(self, model: nn.Module) -> nn.Module:
        """The adapter after the pixel shuffle, which is part of the tower."""
        tower: Any = self.tower(model)
        return tower.vision_adapter.mlp  # type: ignore[no-any-return]

    def merge_size(self, model: nn.Module) -> int:
        """Usually 2: the pixel shuffle makes one token from 2 x 2 patches."""
        config: Any = model.config
        return int(1 / config.vision_config.pixel_shuffle_ratio)

    def prompt_tilings(self, model: nn.Module, input_ids: Tensor) -> list[Tiling]:
        """Tile by tile; the token that follows the last of them ends every row of tiles."""
        height, width = self.grid(model)
        size = height * width
        found = []
        for image in self.still_images(model, {"input_ids": input_ids}):
            ends = [column + 1 for column in image.columns[size - 1 :: size]]
            following = input_ids[image.row, ends[:-1]].tolist()
            rows = following.count(following[-1]) if following else 0
            even = rows > 0 and len(following) % rows == 0
            placed = (rows, len(following) // rows) if even else image.grid
            found.append(tiles_apart(image, size, placed))
        return found

    def still_images(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Image]:
        """Images of a prompt: the image tokens after every start token."""
        config: Any = model.config
        ids = inputs["input_ids"]
        starts = (ids == config.boi_token_id).cumsum(1).tolist()
        images = []
        for row, columns in enumerate(placeholder_runs(ids, config.image_token_id)):
            groups: dict[int, list[int]] = {}
            for column in columns:
                groups.setdefault(starts[row][column], []).append(column)
            for index, found in enumerate(groups.values()):
                images.append(tiled_image(row, index, found, self.grid(model)))
        return images

    def example(self, model: nn.Module, noise: Noise) -> tuple[list[int], dict[str, Tensor]]:
        """One image of two tiles and the whole view."""
        config: Any = model.config
        height, width = self.grid(model)
        tile = [config.image_token_id] * (height * width)
        ids = [config.boi_token_id, *tile, TAG, *tile, TAG + 1, TAG + 2, *tile]
        side = config.vision_config.image_size
        return [*ids, config.eoi_token_id], {"pixel_values": noise(3, 3, side, side)}

    def shrink(self, config: dict[str, Any]) -> None:
        """The adapter takes the squares of patches as wide as the tower's MLP."""
        vision = config["vision_config"]
        merge = round(1 / vision["pixel_shuffle_ratio"])
        vision["intermediate_size"] = vision["hidden_size"] * merge**2

    def shape(self, config: Any, decoder: DecoderShape) -> ModelShape:
        """Two matrices on squares of patches, then one."""
        vision, tower = config.vision_config, tower_of(config)
        wide, out = (size(vision, f"projector_{x}_dim") for x in ("input", "output"))
        last = size(vision, "vision_output_dim") * decoder.hidden
        projector = tower.intermediate * wide + out**2 + last
        merge = round(1 / vision.pixel_shuffle_ratio)
        return ModelShape.of_tiles(decoder, tower, projector, merge)

    def grid(self, model: nn.Module) -> tuple[int, int]:
        """The grid of a tile: its patches, two by two in a token."""
        config: Any = model.config
        vision = config.vision_config
        side = int(vision.image_size // vision.patch_size * vision.pixel_shuffle_ratio)
        return side, side
