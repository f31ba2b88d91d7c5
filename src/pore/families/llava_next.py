"""LLaVA-NeXT: a whole image and its tiles, padding cut off, a newline token after every row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pore._compat.models import tiles_of
from pore.cost.decoders import DecoderShape
from pore.cost.reading import size
from pore.cost.shapes import MANY_TILES, ModelShape
from pore.families.base import Family, Noise
from pore.families.llava import llava_shape
from pore.layout import Tiling
from pore.tensors.pooling import Pooling


class LlavaNext(Family):
    """`LlavaNextForConditionalGeneration`: CLIP tower over tiles, MLP projector, decoder."""

    name = "LLaVA-NeXT"
    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)
    encodes = True
    tiles = True
    tower_refusal = None

    def tilings(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tiling]:
        """How the images of a call of `get_image_features` become tokens.

        The model's own packing is run on patch numbers in place of patch features.
        """
        base: Any = self.base(model)
        config = base.config
        n = config.vision_config.image_size // config.vision_config.patch_size
        strategy = inputs.get("vision_feature_select_strategy")
        strategy = strategy or config.vision_feature_select_strategy
        patches = n * n + int(strategy == "full" and self.tower_has_cls(model))
        found = []
        for image_size in inputs["image_sizes"]:
            height, width = self._tiles(model, image_size)
            tiles = height * width + 1
            numbers = torch.arange(tiles * patches, dtype=torch.float64).view(tiles, patches, 1)
            packed, _ = base.pack_image_features(
                [numbers],
                [image_size],
                vision_feature_select_strategy=strategy,
                image_newline=torch.tensor([-1.0], dtype=torch.float64),
            )
            slots = tuple(packed[0][:, 0].long().tolist())
            pixels = (int(image_size[0]), int(image_size[1]))
            found.append(Tiling(tiles, (height, width), patches, slots, pixels))
        return found

    def _tiles(self, model: nn.Module, size: Tensor) -> tuple[int, int]:
        """(rows, columns) of the tiles of an image of (height, width) pixels."""
        config: Any = self.base(model).config
        return tiles_of(size, config.image_grid_pinpoints, config.vision_config.image_size)

    def example(self, model: nn.Module, noise: Noise) -> tuple[list[int], dict[str, Tensor]]:
        """One image that is taller than wide, in two tiles whose padding is cut off."""
        config: Any = model.config
        side = config.vision_config.image_size
        sizes = torch.tensor([[2 * side, side - side // 4]])
        (tiling,) = self.tilings(model, {"image_sizes": sizes})
        pixels = noise(1, tiling.tiles, 3, side, side)
        ids = [self.placeholder_id(model)] * len(tiling.slots)
        return ids, {"pixel_values": pixels, "image_sizes": sizes}

    def shape(self, config: Any, decoder: DecoderShape) -> ModelShape:
        """As LLaVA, tile by tile."""
        return replace(llava_shape(config, decoder), varies=MANY_TILES)

    def grid(self, model: nn.Module) -> None:
        """None: every image has its own."""


class LlavaNextVideo(LlavaNext):
    """`LlavaNextVideoForConditionalGeneration`: the same, and videos of frames without tiles.

    Squares of a frame's patches are averaged before the projector.
    """

    name = "LLaVA-NeXT-Video"
    model_types: ClassVar[tuple[str, ...]] = ("llava_next_video",)
    encodes_videos = True

    @property
    def of_videos(self) -> Family:
        """A token for every square of a frame's patches."""
        return _AveragedFrames()

    def video_tilings(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tiling]:
        """Frame by frame, row by row."""
        config: Any = model.config
        vision = config.vision_config
        side = vision.image_size // vision.patch_size // config.spatial_pool_stride
        return _frames(inputs, side * side)

    def shape(self, config: Any, decoder: DecoderShape) -> ModelShape:
        """As LLaVA-NeXT; of a frame, squares of patches are averaged before the projector."""
        shape = super().shape(config, decoder)
        assert shape.tower is not None
        frame = (shape.tower.side // size(config, "spatial_pool_stride")) ** 2
        return replace(shape, frame_tokens=frame)


class LlavaOnevision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration`: SigLIP tower over tiles, MLP projector, Qwen2.

    If a sample has several images, they have no tiles. The patches of a large image are blended
    into fewer tokens (`anyres_max_9`), among which no method can choose in the tower. Those of a
    video's frames are blended after the projector.
    """

    name = "LLaVA-OneVision"
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    encodes_videos = True

    @property
    def of_videos(self) -> Family:
        """Tokens are blended from the patches of a frame, after the projector."""
        return _BlendedFrames()

    def tilings(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tiling]:
        """How the images of a call of `get_image_features` become tokens.

        The model's own packing is run on patch coordinates in place of patch features.
        """
        base: Any = self.base(model)
        config = base.config
        n = config.vision_config.image_size // config.vision_config.patch_size
        aspect = inputs.get("vision_aspect_ratio") or config.vision_aspect_ratio
        sizes, several = inputs["image_sizes"], inputs.get("batch_num_images")
        if several is None:
            tiled = [True] * len(sizes)
        else:
            tiled = [count == 1 for count in several for _ in range(count)]
        found = []
        for image_size, cut in zip(sizes, tiled, strict=True):
            pixels = (int(image_size[0]), int(image_size[1]))
            if not cut:
                found.append(Tiling(1, (n, n), n * n, (*range(n * n), -1), pixels))
                continue
            rows, columns = self._tiles(model, image_size)
            sides = (torch.arange(k * n, dtype=torch.float64) for k in (rows, columns))
            plane = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1)
            places = plane.view(rows, n, columns, n, 2).transpose(1, 2).reshape(-1, n * n, 2)
            packed, _ = base.pack_image_features(
                [torch.cat([places[:1], places])],
                [image_size],
                image_newline=torch.full((2,), -1.0, dtype=torch.float64),
                vision_aspect_ratio=aspect,
            )
            y, x = packed[0][n * n :].round().long().unbind(-1)
            tile = y // n * columns + x // n + 1
            slots = torch.where(y < 0, -1, tile * n * n + y % n * n + x % n)
            blended = bool((packed[0].round() != packed[0]).any())
            numbers = (*range(n * n), *slots.tolist())
            grid = (rows, columns)
            found.append(Tiling(rows * columns + 1, grid, n * n, numbers, pixels, blended))
        return found

    def video_tilings(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tiling]:
        """Frame by frame, row by row, and a newline token at the end."""
        config: Any = model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        side = (side + 1) // 2
        return _frames(inputs, side * side, end=True)


class _AveragedFrames(LlavaNextVideo):
    """Frames of LLaVA-NeXT-Video."""

    merged = True

    def merge_size(self, model: nn.Module) -> int:
        """`spatial_pool_stride`."""
        config: Any = model.config
        return int(config.spatial_pool_stride)

    def groups(self, model: nn.Module, patches: int) -> Tensor:
        """Whole squares; a row or column of patches that fills none is left out."""
        size, side = self.merge_size(model), math.isqrt(patches)
        whole = side - side % size
        numbers = torch.arange(patches).view(side, side)[:whole, :whole]
        squares = numbers.reshape(whole // size, size, whole // size, size).transpose(1, 2)
        return squares.reshape(-1, size * size)


class _BlendedFrames(LlavaOnevision):
    """Frames of LLaVA-OneVision."""

    merged = True
    pools_after = "apply_pooling"

    def pooling(self, model: nn.Module, patches: int) -> Pooling:
        """The model's own interpolation, found by how it blends patches of which one is 1."""
        base: Any = self.base(model)
        weights = type(base).apply_pooling(base, torch.eye(patches)[None])
        return Pooling.of_weights(weights[0])


def _frames(inputs: Mapping[str, Any], tokens: int, end: bool = False) -> list[Tiling]:
    """Videos (V, frames, 3, H, W): this many tokens for each frame, and a newline."""
    pixels = inputs.get("pixel_values_videos")
    pixels = inputs["pixel_values"] if pixels is None else pixels  # before transformers 5.18
    frames = pixels.shape[1]
    slots = (*range(frames * tokens), *((-1,) if end else ()))
    tiling = Tiling(frames, None, tokens, slots, blended=True, apart=True, of_frames=True)
    return [tiling] * len(pixels)
