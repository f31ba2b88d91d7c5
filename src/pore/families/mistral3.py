"""Mistral 3 and other models with a Pixtral tower: images of any size, a break after every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pore.cost.decoders import DecoderShape
from pore.cost.reading import size
from pore.cost.shapes import ANY_SIZE, ModelShape
from pore.cost.towers import tower_of
from pore.families.base import TAG, Family, Noise
from pore.families.llava import mlp_projector
from pore.layout import Image, Packing, Tiling


class Mistral3(Family):
    """`Mistral3ForConditionalGeneration`: Pixtral tower, patch merger, MLP projector, decoder.

    After every row of an image comes `[IMG_BREAK]`, after the last one `[IMG_END]`; both are
    structure. The decoder is that of Mistral or of Ministral 3.
    """

    name = "Mistral 3"
    model_types: ClassVar[tuple[str, ...]] = ("mistral3",)
    encodes = True
    merged = True
    packed = True
    tower_refusal = None

    def tower_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """All layers of the vision tower."""
        tower: Any = self.tower(model)
        return tower.transformer.layers  # type: ignore[no-any-return]

    def tower_attention(self, layer: nn.Module) -> nn.Module:
        """The self-attention module of a layer of the vision tower."""
        return layer.attention  # type: ignore[return-value]

    def tower_has_cls(self, model: nn.Module) -> bool:
        """There is no CLS token."""
        return False

    def token_features(self, model: nn.Module) -> nn.Module:
        """The layer that makes one token from a square of patches."""
        projector: Any = self.projector(model)
        return projector.patch_merger.merging_layer  # type: ignore[no-any-return]

    def merge_size(self, model: nn.Module) -> int:
        """`spatial_merge_size`, mostly 2."""
        config: Any = model.config
        return int(config.spatial_merge_size)

    def packing(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Packing:
        """Image after image, each of them row by row of patches."""
        inputs = {"pixel_values": self.pixels(args, kwargs), **kwargs}
        config: Any = model.config
        patch, size = config.vision_config.patch_size, self.merge_size(model)
        grids, groups, before = [], [], 0
        for height, width in ((h // patch, w // patch) for h, w in _sizes(inputs)):
            grid = (height // size, width // size)
            patches = torch.arange(before, before + height * width).view(height, width)
            squares = patches[: grid[0] * size, : grid[1] * size]
            squares = squares.reshape(grid[0], size, grid[1], size).transpose(1, 2)
            grids.append(grid)
            groups.append(squares.reshape(-1, size**2))
            before += height * width
        return Packing(tuple(grids), size**2, groups=torch.cat(groups))

    def tilings(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tiling]:
        """One token for every square of merged patches, in raster order."""
        config: Any = model.config
        side = config.vision_config.patch_size * self.merge_size(model)
        found = []
        for height, width in _sizes(inputs):
            grid = (height // side, width // side)
            count = grid[0] * grid[1]
            found.append(Tiling(1, grid, count, tuple(range(count))))
        return found

    def still_images(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Image]:
        """Images of a prompt: image tokens, cut by the number of tokens of each image."""
        found = super().still_images(model, inputs)
        visual = (inputs["input_ids"] == self.placeholder_id(model)).tolist()
        return [replace(image, structure=_breaks(image, visual[image.row])) for image in found]

    def example(self, model: nn.Module, noise: Noise) -> tuple[list[int], dict[str, Tensor]]:
        """One image of 4 x 4 tokens."""
        config: Any = model.config
        side = 4 * config.vision_config.patch_size * self.merge_size(model)
        ids = [*([*[config.image_token_id] * 4, TAG] * 4)[:-1], TAG + 1]
        sizes = torch.tensor([[side, side]])
        return ids, {"pixel_values": noise(1, 3, side, side), "image_sizes": sizes}

    def shape(self, config: Any, decoder: DecoderShape) -> ModelShape:
        """Squares of patches to one by one matrix, then as LLaVA."""
        tower, merge = tower_of(config), size(config, "spatial_merge_size")
        layer = getattr(config, "vision_feature_layer", -1)
        wide = tower.hidden * (1 if isinstance(layer, int) else len(layer))
        projector = tower.hidden**2 * merge**2 + decoder.hidden * (wide + decoder.hidden)
        return ModelShape(decoder, tower, projector, None, merge, varies=ANY_SIZE)

    def grid(self, model: nn.Module) -> None:
        """None: every image has its own."""


class Pixtral(Mistral3):
    """`LlavaForConditionalGeneration` with a Pixtral tower (Pixtral 12B): a token for a patch."""

    name = "Pixtral"
    model_types = ("llava+pixtral",)
    merged = False

    def token_features(self, model: nn.Module) -> nn.Module:
        """The projector."""
        return self.projector(model)

    def merge_size(self, model: nn.Module) -> int:
        """Nothing is merged: 1."""
        return 1

    def shape(self, config: Any, decoder: DecoderShape) -> ModelShape:
        """LLaVA's projector."""
        tower = tower_of(config)
        projector = mlp_projector(config, decoder, tower)
        return ModelShape(decoder, tower, projector, None, varies=ANY_SIZE)


class LightOnOcr(Mistral3):
    """`LightOnOcrForConditionalGeneration`: the same with a Qwen3 decoder, and rows unmarked."""

    name = "LightOnOCR"
    model_types = ("lighton_ocr",)

    def tower(self, model: nn.Module) -> nn.Module:
        """The vision tower."""
        return self.base(model).vision_encoder  # type: ignore[return-value]

    def projector(self, model: nn.Module) -> nn.Module:
        """The patch merger and the projection."""
        return self.base(model).vision_projection  # type: ignore[return-value]

    def still_images(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Image]:
        """Images of a prompt: image tokens, cut by the number of tokens of each image."""
        return [replace(image, structure=()) for image in super().still_images(model, inputs)]

    def example(self, model: nn.Module, noise: Noise) -> tuple[list[int], dict[str, Tensor]]:
        """One image of 4 x 4 tokens, without breaks."""
        ids, inputs = super().example(model, noise)
        token = self.placeholder_id(model)
        return [one for one in ids if one == token], inputs


def _sizes(inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(height, width) in pixels of every image, without the padding to the largest."""
    sizes = inputs.get("image_sizes")
    if sizes is None:  # then there is no padding
        pixels = inputs["pixel_values"]
        sizes = [pixels.shape[-2:]] * len(pixels)
    return [(int(height), int(width)) for height, width in sizes]


def _breaks(image: Image, visual: Sequence[bool]) -> list[int]:
    """Where the tokens that end the rows of an image are.

    Args:
        image: The image.
        visual: For each token of its sample, whether it is a visual token.

    Returns:
        Their columns; none where the rows of the image follow one another.
    """
    assert image.grid is not None
    height, width = image.grid
    after = [column + 1 for column in image.columns[width - 1 :: width]]
    found = [column for column in after if column < len(visual) and not visual[column]]
    return found if len(found) == height else []
