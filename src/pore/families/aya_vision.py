"""Aya Vision and Command A Vision: tiles with a token before or after each, pixel shuffle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pore.cost.decoders import DecoderShape
from pore.cost.reading import size
from pore.cost.shapes import ModelShape
from pore.cost.towers import tower_of
from pore.families.base import TAG, Family, Noise
from pore.families.prompts import placeholder_runs, tiled_image, whole_tiles
from pore.layout import Image


class AyaVision(Family):
    """`AyaVisionForConditionalGeneration`: SigLIP tower, pixel shuffle, Cohere 2 decoder.

    An image is its tiles, row by row, and after them the whole image at low resolution. Before
    each stands its tag, `TILE_1` and so on or `TILE_GLOBAL`; what stands between the tiles of an
    image is structure. Most decoder layers have a sliding window, the others no positions.
    """

    name = "Aya Vision"
    model_types = ("aya_vision",)
    tiles = True
    tower_refusal = None
    tiled_prompts = True
    tiles_placed = False
    merged = True

    def token_features(self, model: nn.Module) -> nn.Module:
        """The projection after the pixel shuffle."""
        projector: Any = self.projector(model)
        return projector.linear_1  # type: ignore[no-any-return]

    def merge_size(self, model: nn.Module) -> int:
        """The pixel shuffle's `downsample_factor`."""
        config: Any = model.config
        return int(config.downsample_factor)

    def still_images(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Image]:
        """Images of a prompt: tiles of image tokens, those of an image together."""
        ids, grid = inputs["input_ids"], self.grid(model)
        images = []
        for row, columns in enumerate(placeholder_runs(ids, self.placeholder_id(model))):
            tiles = whole_tiles(row, columns, grid[0] * grid[1])
            groups = self.grouped(tiles, ids[row].tolist() if tiles else [])
            for index, group in enumerate(groups):
                images.append(tiled_image(row, index, [c for tile in group for c in tile], grid))
        return images

    def grouped(
        self, tiles: Sequence[Sequence[int]], ids: Sequence[int]
    ) -> list[list[Sequence[int]]]:
        """Put the tiles of each image of a sample together.

        The config does not name the tags, but the last tile of a prompt is a whole view, so its tag
        is the tag of whole views.

        Args:
            tiles: The columns of every tile.
            ids: Token ids of the sample.
        """
        images: list[list[Sequence[int]]] = [[]]
        for tile in tiles:
            images[-1].append(tile)
            if ids[tile[0] - 1] == ids[tiles[-1][0] - 1]:
                images.append([])
        return [image for image in images if image]

    def example(self, model: nn.Module, noise: Noise) -> tuple[list[int], dict[str, Tensor]]:
        """One image of two tiles and the whole view."""
        config: Any = model.config
        height, width = self.grid(model)
        ids = self.tagged(config.image_token_id, height * width)
        side = config.vision_config.image_size
        return ids, {"pixel_values": noise(3, 3, side, side)}

    def tagged(self, token: int, count: int) -> list[int]:
        """The token ids of an image of three tiles.

        Args:
            token: The placeholder.
            count: Tokens of a tile.
        """
        tile = [token] * count
        return [TAG, TAG + 1, *tile, TAG + 2, *tile, TAG + 3, *tile, TAG + 4]

    def shape(self, config: Any, decoder: DecoderShape) -> ModelShape:
        """Two matrices on squares of patches, half of what the first makes a gate."""
        tower, merge = tower_of(config), size(config, "downsample_factor")
        wide = size(config, "alignment_intermediate_size", default=decoder.hidden)
        projector = tower.hidden * merge**2 * wide + wide // 2 * decoder.hidden
        return ModelShape.of_tiles(decoder, tower, projector, merge)

    def grid(self, model: nn.Module) -> tuple[int, int]:
        """The grid of a tile: its patches, `downsample_factor` squared in a token."""
        config: Any = model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        side //= config.downsample_factor
        return side, side


class Cohere2Vision(AyaVision):
    """`Cohere2VisionForConditionalGeneration` (Command A Vision): a line break after every tile.

    Between `<|START_OF_IMG|>` and `<|END_OF_IMG|>` are the tiles of an image, with one token
    between two of them.
    """

    name = "Command A Vision"
    model_types = ("cohere2_vision",)

    def grouped(
        self, tiles: Sequence[Sequence[int]], ids: Sequence[int]
    ) -> list[list[Sequence[int]]]:
        """Put the tiles of each image of a sample together: those with one token between them."""
        images: list[list[Sequence[int]]] = []
        for tile in tiles:
            if images and tile[0] == images[-1][-1][-1] + 2:
                images[-1].append(tile)
            else:
                images.append([tile])
        return images

    def tagged(self, token: int, count: int) -> list[int]:
        """The token ids of an image of three tiles."""
        return [TAG, *[*[token] * count, TAG + 1] * 3, TAG + 2]
