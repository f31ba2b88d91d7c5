"""Mistral 3 and other models with a Pixtral tower: images of any size, a break behind every row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from pore.families.base import Family, comes_with, encoded_images, placeholder_runs
from pore.layout import Image, Tiling


class Mistral3(Family):
    """`Mistral3ForConditionalGeneration`: Pixtral tower, patch merger, MLP projector, decoder.

    Behind every row of an image stands `[IMG_BREAK]`, behind the last one `[IMG_END]`; both are
    structure. The decoder is that of Mistral or of Ministral 3.
    """

    name = "Mistral 3"
    model_types: ClassVar[tuple[str, ...]] = ("mistral3",)
    encodes = True
    tower_refusal = (
        "every visual token is a square of patches, and the tower, which has no CLS token, takes "
        "all images in one sequence. Use a method that acts on the embeddings or in the decoder."
    )

    def tilings(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tiling]:
        """One token for every square of merged patches, in raster order."""
        sizes = inputs.get("image_sizes")
        if sizes is None:  # then none is padded
            pixels = inputs["pixel_values"]
            sizes = [pixels.shape[-2:]] * len(pixels)
        side = self.side(model)
        found = []
        for height, width in sizes:
            grid = (int(height) // side, int(width) // side)
            count = grid[0] * grid[1]
            found.append(Tiling(1, grid, count, tuple(range(count))))
        return found

    def side(self, model: nn.Module) -> int:
        """Height and width in pixels of what becomes a visual token."""
        config: Any = model.config
        return int(config.vision_config.patch_size * config.spatial_merge_size)

    def images(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Image]:
        """Images of a prompt: image tokens, cut by what each image comes to."""
        if not comes_with(inputs, "image"):
            return []
        config: Any = model.config
        columns = placeholder_runs(inputs["input_ids"], config.image_token_id)
        found = encoded_images(columns, inputs.get("tilings") or self.tilings(model, inputs))
        visual = [set(row) for row in columns]
        length = inputs["input_ids"].shape[1]
        return [replace(i, structure=_breaks(i, visual[i.row], length)) for i in found]

    def grid(self, model: nn.Module) -> None:
        """None: every image has its own."""


class Pixtral(Mistral3):
    """`LlavaForConditionalGeneration` with a Pixtral tower (Pixtral 12B): a token for a patch."""

    name = "Pixtral"
    model_types = ("llava+pixtral",)
    tower_refusal = (
        "it has no CLS token and takes all images in one sequence. Use a method that acts on the "
        "embeddings or in the decoder."
    )

    def side(self, model: nn.Module) -> int:
        """Height and width of a patch."""
        config: Any = model.config
        return int(config.vision_config.patch_size)


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

    def images(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Image]:
        """Images of a prompt: image tokens, cut by what each image comes to."""
        return [replace(image, structure=()) for image in super().images(model, inputs)]


def _breaks(image: Image, visual: set[int], length: int) -> list[int]:
    """Where the tokens behind the rows of an image are.

    Args:
        image: The image.
        visual: Columns of all visual tokens of its sample.
        length: Tokens of the sample.

    Returns:
        Their columns; none where the rows of the image follow one another.
    """
    assert image.grid is not None
    height, width = image.grid
    behind = [column + 1 for column in image.columns[width - 1 :: width]]
    found = [column for column in behind if column < length and column not in visual]
    return found if len(found) == height else []
