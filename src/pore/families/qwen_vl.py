"""Qwen-VL: images of any size, positions on three axes, patches merged two by two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pore._compat.models import window_order
from pore.cost.decoders import DecoderShape
from pore.cost.reading import size
from pore.cost.shapes import ANY_SIZE, ModelShape
from pore.cost.towers import tower_of
from pore.families.base import TAG, Family, Noise
from pore.layout import Packing, Tiling


class QwenVL(Family):
    """`Qwen2VLForConditionalGeneration` and `Qwen2_5_VLForConditionalGeneration`.

    Visual tokens keep their positions on the time, height and width axes, and text has the same
    positions as without pruning.
    """

    name = "Qwen2-VL"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl")
    encodes = True
    encodes_videos = True
    mrope = True
    merged = True
    packed = True
    tower_refusal = None

    def tower(self, model: nn.Module) -> nn.Module:
        """The vision tower."""
        return self.base(model).visual  # type: ignore[return-value]

    def tower_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """All layers of the vision tower."""
        return self.tower(model).blocks  # type: ignore[return-value]

    def tower_attention(self, layer: nn.Module) -> nn.Module:
        """The self-attention module of a layer of the vision tower."""
        return layer.attn  # type: ignore[return-value]

    def tower_attended(self, model: nn.Module, layer: int) -> int:
        """In Qwen2.5-VL, the last layer up to this one that sees whole images, or the first."""
        config: Any = self.tower(model).config
        full: list[int] = sorted(getattr(config, "fullatt_block_indexes", [layer]))
        return max((i for i in full if i <= layer), default=full[0])

    def tower_has_cls(self, model: nn.Module) -> bool:
        """There is no CLS token."""
        return False

    def projector(self, model: nn.Module) -> nn.Module:
        """What makes one token from a square of patches."""
        return self.tower(model).merger  # type: ignore[return-value]

    def merge_size(self, model: nn.Module) -> int:
        """`spatial_merge_size`, in all of them 2."""
        config: Any = self.tower(model).config
        return int(config.spatial_merge_size)

    def packing(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Packing:
        """Image after image, frame after frame; within each, Qwen2.5-VL has the tokens of a window
        side by side."""
        grids: Tensor = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        config: Any = self.tower(model).config
        size = self.merge_size(model)
        windows = hasattr(config, "fullatt_block_indexes")
        return Packing(
            grids=tuple(
                (height // size, width // size)
                for frames, height, width in grids.tolist()
                for _ in range(frames)
            ),
            patches=size**2,
            order=window_order(config, grids) if windows else None,
        )

    def tilings(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tiling]:
        """One token for every square of merged patches, in raster order."""
        return self._merged(model, inputs["image_grid_thw"])

    def video_tilings(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tiling]:
        """The same, frame by frame."""
        return self._merged(model, inputs["video_grid_thw"])

    def _merged(self, model: nn.Module, grids: Tensor) -> list[Tiling]:
        config: Any = model.config
        merge = config.vision_config.spatial_merge_size
        found = []
        for frames, height, width in grids.tolist():
            grid = (height // merge, width // merge)
            count = frames * grid[0] * grid[1]
            slots = tuple(range(count))
            if frames == 1:
                found.append(Tiling(1, grid, count, slots))
            else:
                found.append(Tiling(1, None, count, slots, video=(frames, *grid)))
        return found

    def views(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
        """The image whole again: the processor cuts it into patches, square by square to merge."""
        config: Any = model.config
        vision = config.vision_config
        merge, side = vision.spatial_merge_size, vision.patch_size
        ((_, height, width),) = inputs["image_grid_thw"].tolist()
        blocks = (height // merge, width // merge, merge, merge, 3, -1, side, side)
        patches = inputs["pixel_values"].reshape(blocks)[:, :, :, :, :, 0]  # two equal frames
        return [patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, height * side, width * side)]

    def example(self, model: nn.Module, noise: Noise) -> tuple[list[int], dict[str, Tensor]]:
        """One image of 4 x 4 tokens."""
        config: Any = model.config
        vision = config.vision_config
        side = 4 * vision.spatial_merge_size
        values = 3 * vision.temporal_patch_size * vision.patch_size**2
        ids = [getattr(config, "vision_start_token_id", TAG), *[config.image_token_id] * 16]
        grid = torch.tensor([[1, side, side]])
        return ids, {"pixel_values": noise(side**2, values), "image_grid_thw": grid}

    def prompt_types(self, model: nn.Module, ids: Tensor, answer: int) -> dict[str, Tensor]:
        """Which tokens belong to images; positions on three axes depend on it."""
        return {"mm_token_type_ids": (ids == self.placeholder_id(model)).int()}

    def shape(self, config: Any, decoder: DecoderShape) -> ModelShape:
        """Two matrices on squares of patches; those of DeepStack besides."""
        vision, tower = config.vision_config, tower_of(config)
        merge = size(vision, "spatial_merge_size")
        wide = tower.hidden * merge**2
        out = size(vision, "hidden_size" if config.model_type == "qwen2_vl" else "out_hidden_size")
        projector = wide * (wide + out)
        stacked = projector * len(getattr(vision, "deepstack_visual_indexes", None) or ())
        return ModelShape(decoder, tower, projector, None, merge, stacked, varies=ANY_SIZE)

    def grid(self, model: nn.Module) -> None:
        """None: every image has its own."""


class Qwen3VL(QwenVL):
    """`Qwen3VLForConditionalGeneration`, with experts or without.

    The first decoder layers add features of lower tower layers to the visual tokens (DeepStack);
    dropped tokens get none.
    """

    name = "Qwen3-VL"
    model_types = ("qwen3_vl", "qwen3_vl_moe")
    deepstack = True

    def shrink(self, config: dict[str, Any]) -> None:
        """Keep all tower layers that give features to the decoder, and add one that does not."""
        vision = config["vision_config"]
        count = len(vision["deepstack_visual_indexes"])
        vision["deepstack_visual_indexes"], vision["depth"] = list(range(count)), count + 1


class Qwen35(QwenVL):
    """`Qwen3_5ForConditionalGeneration`, with experts or without.

    Three of four decoder layers are recurrent. They continue as if dropped tokens had never been
    there, and have no attention to rank by.
    """

    name = "Qwen3.5"
    model_types = ("qwen3_5", "qwen3_5_moe")
    recurrent_mixer = "linear_attn"
