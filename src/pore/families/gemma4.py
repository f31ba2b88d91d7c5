"""Gemma 4: images of any size, inputs for every layer, layers that look at keys of earlier ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pore._compat.masks import block_masks, own_masks
from pore.families.base import Family, Noise
from pore.layout import Tiling


class Gemma4(Family):
    """`Gemma4ForConditionalGeneration`, with experts or without: squares of patches are averaged.

    In the small models, later decoder layers look at the keys of the last earlier layer of their
    kind; a token that was dropped there is hidden from them. In the large ones tokens of an image
    see each other in layers with a sliding window.
    """

    name = "Gemma 4"
    model_types: ClassVar[tuple[str, ...]] = ("gemma4",)
    encodes = True
    encodes_videos = True
    token_types = "mm_token_type_ids"
    token_inputs: ClassVar[tuple[str, ...]] = ("per_layer_input", "per_layer_inputs")
    shares_keys = True
    tower_refusal = (
        "every visual token is the mean of a square of patches, those of all images lie in one "
        "sequence, and there is no CLS token. Use a method that acts on the embeddings or in the "
        "decoder."
    )

    def source(self, model: nn.Module, layer: int) -> int | None:
        """The last layer of the same kind before those that share."""
        config: Any = self.decoder(model).config
        kinds: Sequence[str] = config.layer_types
        first = len(kinds) - config.num_kv_shared_layers
        if layer < first:
            return None
        return max(i for i in range(first) if kinds[i] == kinds[layer])

    def rotary(self, model: nn.Module, hidden: Tensor, positions: Tensor, layer: int) -> Any:
        """Rotary tables of the layer's kind."""
        decoder: Any = self.decoder(model)
        return decoder.rotary_emb(hidden, positions, decoder.config.layer_types[layer])

    def masks(
        self, model: nn.Module, embeds: Tensor, tokens: Tensor, cache: Any, types: Tensor
    ) -> Any:
        """The model's own masks, by kind of layer."""
        return own_masks(type(model), model.config, embeds, tokens, cache, mm_token_type_ids=types)

    def tilings(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tiling]:
        """One token for every square of patches, in raster order."""
        return [_averaged([grid]) for grid in self._grids(model, inputs["image_position_ids"])]

    def video_tilings(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tiling]:
        """The same, frame by frame."""
        positions: Tensor = inputs["video_position_ids"]
        if positions.dim() == 4:  # older versions of transformers need videos of equal length
            frames = [positions.shape[1]] * positions.shape[0]
            positions = positions.flatten(0, 1)
        else:
            frames = inputs["num_frames_per_video"].tolist()
        grids = self._grids(model, positions)
        return [_averaged([grids.pop(0) for _ in range(count)]) for count in frames]

    def _grids(self, model: nn.Module, positions: Tensor) -> list[tuple[int, int]]:
        """(height, width) in tokens of images whose patches lie at (I, N, 2) x and y, or -1."""
        sizes = (positions.amax(1) + 1) // self._side(model)
        return [(height, width) for width, height in sizes.tolist()]

    def _side(self, model: nn.Module) -> int:
        """Patches along a side of what becomes one token."""
        config: Any = model.config
        return int(config.vision_config.pooling_kernel_size)

    def views(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
        """The image whole again: the processor cuts it into patches, and fills up their number."""
        (patches,), (positions,) = inputs["pixel_values"], inputs["image_position_ids"]
        side = math.isqrt(patches.shape[-1] // 3)
        width, height = (positions.amax(0) + 1).tolist()
        real = (positions >= 0).all(1)
        x, y = positions[real].unbind(1)
        view = patches.new_zeros(height, width, side, side, 3)
        view[y, x] = patches[real].view(-1, side, side, 3)
        return [view.permute(4, 0, 2, 1, 3).reshape(3, height * side, width * side)]

    def example(self, model: nn.Module, noise: Noise) -> tuple[list[int], dict[str, Tensor]]:
        """One image of 4 x 4 tokens."""
        config: Any = model.config
        side = 4 * self._side(model)
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ids = [config.boi_token_id, *[config.image_token_id] * 16, config.eoi_token_id]
        return ids, {
            "pixel_values": noise(1, side**2, self._values(config.vision_config)),
            "image_position_ids": torch.stack([x.flatten(), y.flatten()], -1)[None],
        }

    def _values(self, vision: Any) -> int:
        """Numbers in a patch."""
        return int(3 * vision.patch_size**2)


class Gemma4Unified(Gemma4):
    """`Gemma4UnifiedForConditionalGeneration`: patches go into the decoder without a tower.

    Tokens of an image see each other in every layer.
    """

    name = "Gemma 4 Unified"
    model_types = ("gemma4_unified",)
    token_inputs = ()
    tower_refusal = (
        "there is none: patches are projected one by one. Use a method that acts on the embeddings "
        "or in the decoder."
    )

    def masks(
        self, model: nn.Module, embeds: Tensor, tokens: Tensor, cache: Any, types: Tensor
    ) -> Any:
        """The masks of the model's forward, by kind of layer."""
        config: Any = self.decoder(model).config
        visual = (types == 1) | (types == 2)
        if config.use_bidirectional_attention != "vision":
            visual = torch.zeros_like(visual)
        starts = visual & ~nn.functional.pad(visual, (1, 0))[:, :-1]
        blocks = torch.where(visual, starts.cumsum(1), -1)
        return block_masks(config, embeds, tokens, cache, blocks)

    def _side(self, model: nn.Module) -> int:
        """Patches are as large as what becomes a token."""
        return 1

    def _values(self, vision: Any) -> int:
        return int(3 * (vision.patch_size * vision.pooling_kernel_size) ** 2)


def _averaged(grids: Sequence[tuple[int, int]]) -> Tiling:
    """How an image, or the frames of a video, become tokens."""
    count = sum(height * width for height, width in grids)
    slots = tuple(range(count))
    if len(grids) == 1:
        return Tiling(1, grids[0], count, slots)
    video = (len(grids), *grids[0]) if len(set(grids)) == 1 else None
    return Tiling(1, None, count, slots, video=video)
