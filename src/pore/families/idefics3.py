"""Idefics3 and SmolVLM: tiles with their own tags, and squares of patches shuffled into a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pore.cost.decoders import DecoderShape
from pore.cost.reading import size
from pore.cost.shapes import ModelShape
from pore.cost.towers import tower_of
from pore.families.base import TAG, Family, Noise
from pore.families.prompts import placeholder_runs, tiled_image, tiles_apart, whole_tiles
from pore.layout import Image, Tiling


class Idefics3(Family):
    """`Idefics3ForConditionalGeneration` and `SmolVLMForConditionalGeneration`.

    An image is its tiles, row by row, and after them the whole image at low resolution. Before
    each stand two tokens, `<fake_token_around_image>` and the tag of its row and column or
    `<global-img>`; what stands between the tiles of an image is structure.
    """

    name = "SmolVLM"
    model_types = ("idefics3", "smolvlm")
    tiles = True
    tower_refusal = None
    tiled_prompts = True
    merged = True

    def decoder(self, model: nn.Module) -> nn.Module:
        """The language model without its head."""
        return self.base(model).text_model  # type: ignore[return-value]

    def tower(self, model: nn.Module) -> nn.Module:
        """The vision tower."""
        return self.base(model).vision_model  # type: ignore[return-value]

    def projector(self, model: nn.Module) -> nn.Module:
        """The pixel shuffle and the projection."""
        return self.base(model).connector  # type: ignore[return-value]

    def token_features(self, model: nn.Module) -> nn.Module:
        """The projection after the pixel shuffle."""
        projector: Any = self.projector(model)
        return projector.modality_projection  # type: ignore[no-any-return]

    def merge_size(self, model: nn.Module) -> int:
        """The pixel shuffle's `scale_factor`."""
        config: Any = model.config
        return int(config.scale_factor)

    def prompt_tilings(self, model: nn.Module, input_ids: Tensor) -> list[Tiling]:
        """Tile by tile; a row of them ends where more than the two tokens of a tag follow."""
        height, width = self.grid(model)
        size = height * width
        found = []
        for image in self.still_images(model, {"input_ids": input_ids}):
            rows = _rows(image.columns, size)
            found.append(tiles_apart(image, size, rows if image.grid is None else image.grid))
        return found

    def still_images(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Image]:
        """Images of a prompt: runs of the image token up to one that shows the whole image."""
        ids, grid = inputs["input_ids"], self.grid(model)
        images = []
        for row, columns in enumerate(placeholder_runs(ids, self.placeholder_id(model))):
            tiles = whole_tiles(row, columns, grid[0] * grid[1])
            groups = _grouped(tiles, ids[row].tolist() if tiles else [])
            for index, group in enumerate(groups):
                images.append(tiled_image(row, index, [c for tile in group for c in tile], grid))
        return images

    def example(self, model: nn.Module, noise: Noise) -> tuple[list[int], dict[str, Tensor]]:
        """One image of two tiles and the whole view."""
        config: Any = model.config
        height, width = self.grid(model)
        fake, whole, first, second, newline = range(TAG, TAG + 5)
        tile = [config.image_token_id] * (height * width)
        ids = [fake, first, *tile, fake, second, *tile, newline, fake, whole, *tile, fake]
        side = config.vision_config.image_size
        return ids, {"pixel_values": noise(1, 3, 3, side, side)}

    def shape(self, config: Any, decoder: DecoderShape) -> ModelShape:
        """One matrix on squares of patches."""
        tower, merge = tower_of(config), size(config, "scale_factor")
        projector = tower.hidden * merge**2 * decoder.hidden
        return ModelShape.of_tiles(decoder, tower, projector, merge)

    def grid(self, model: nn.Module) -> tuple[int, int]:
        """The grid of a tile: its patches, `scale_factor` by `scale_factor` in a token."""
        config: Any = model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        side //= config.scale_factor
        return side, side


def _rows(columns: Sequence[int], size: int) -> tuple[int, int] | None:
    """(rows, columns) of the tiles before the last; None if rows differ in length."""
    starts = columns[::size]
    ends = [i for i in range(1, len(starts)) if starts[i] - starts[i - 1] > size + 2]
    width = ends[0] if ends else 0
    even = ends == list(range(width, len(starts), width or 1)) and ends[-1:] == [len(starts) - 1]
    return (len(ends), width) if even else None


def _grouped(tiles: Sequence[Sequence[int]], ids: Sequence[int]) -> list[list[Sequence[int]]]:
    """Group the tiles by image: the whole view is the last tile of an image.

    The config does not name the tags, but the last tile of a prompt is a whole view, so its tag is
    the tag of whole views. Tiles without the marks of the processor are images of their own.
    """
    images: list[list[Sequence[int]]] = [[]]
    for tile in tiles:
        images[-1].append(tile)
        first, last = tile[0], tiles[-1]
        marked = first > 1 and last[-1] + 1 < len(ids) and ids[first - 2] == ids[last[-1] + 1]
        if not marked or ids[first - 1] == ids[last[0] - 1]:
            images.append([])
    return [image for image in images if image]
