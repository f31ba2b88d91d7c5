"""Qwen-VL: images of any size, positions on three axes, patches merged two by two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from pore.families.base import Family, encoded_images, placeholder_runs
from pore.layout import Image, Tiling


class QwenVL(Family):
    """`Qwen2VLForConditionalGeneration` and its successors.

    Visual tokens keep their places on the time, height and width axes, and text goes on from where
    it would without pruning. In Qwen3-VL the first decoder layers add features of lower tower
    layers to the visual tokens (DeepStack); dropped tokens get none.
    """

    name = "Qwen-VL"
    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
    encodes = True
    mrope = True
    tower_refusal = (
        "it has no CLS token and attends in windows or over merged patches. Use a method that acts "
        "on the embeddings or in the decoder."
    )

    def tower(self, model: nn.Module) -> nn.Module:
        """The vision tower."""
        return self.base(model).visual  # type: ignore[return-value]

    def tilings(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tiling]:
        """One token for every square of merged patches, in raster order."""
        config: Any = model.config
        merge = config.vision_config.spatial_merge_size
        found = []
        for frames, height, width in inputs["image_grid_thw"].tolist():
            grid = (height // merge, width // merge)
            count = frames * grid[0] * grid[1]
            found.append(Tiling(1, grid if frames == 1 else None, count, tuple(range(count))))
        return found

    def images(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Image]:
        """Images of a prompt: runs of the image token."""
        if inputs.get("pixel_values") is None and not inputs.get("mm_encoder_outputs"):
            return []  # a placeholder that a model generated is no image
        tilings: Sequence[Tiling] | None = inputs.get("tilings")
        if tilings is None:
            tilings = self.tilings(model, inputs)
        config: Any = model.config
        return encoded_images(placeholder_runs(inputs["input_ids"], config.image_token_id), tilings)

    def grid(self, model: nn.Module) -> None:
        """None: every image has its own."""
