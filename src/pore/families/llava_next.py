"""LLaVA-NeXT: a whole image and its tiles, padding cut off, a newline token behind every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pore.families.base import Family, encoded_images, placeholder_runs
from pore.layout import Image, Tiling


class LlavaNext(Family):
    """`LlavaNextForConditionalGeneration`: CLIP tower over tiles, MLP projector, decoder."""

    name = "LLaVA-NeXT"
    model_types = ("llava_next",)
    encodes = True

    def tilings(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tiling]:
        """How the images of a call of `get_image_features` become tokens.

        The model's own packing is run on the numbers of the patches in place of their features.
        """
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        base: Any = self.base(model)
        config = base.config
        n = config.vision_config.image_size // config.vision_config.patch_size
        strategy = inputs.get("vision_feature_select_strategy")
        strategy = strategy or config.vision_feature_select_strategy
        patches = n * n + int(strategy == "full" and self.tower_has_cls(model))
        found = []
        for size in inputs["image_sizes"]:
            height, width = get_anyres_image_grid_shape(
                size, config.image_grid_pinpoints, config.vision_config.image_size
            )
            tiles = height * width + 1
            numbers = torch.arange(tiles * patches, dtype=torch.float64).view(tiles, patches, 1)
            packed, _ = base.pack_image_features(
                [numbers],
                [size],
                vision_feature_select_strategy=strategy,
                image_newline=torch.tensor([-1.0], dtype=torch.float64),
            )
            slots = tuple(packed[0][:, 0].long().tolist())
            pixels = (int(size[0]), int(size[1]))
            found.append(Tiling(tiles, (height, width), patches, slots, pixels))
        return found

    def images(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Image]:
        """Images of a prompt: runs of the image token, cut by what each image's tiles come to."""
        if inputs.get("pixel_values") is None and not inputs.get("mm_encoder_outputs"):
            return []  # a placeholder that a model generated is no image
        tilings: Sequence[Tiling] | None = inputs.get("tilings")
        if tilings is None:
            tilings = self.tilings(model, inputs)
        config: Any = model.config
        columns = placeholder_runs(inputs["input_ids"], config.image_token_id)
        return encoded_images(columns, tilings)

    def grid(self, model: nn.Module) -> None:
        """None: every image has its own."""
