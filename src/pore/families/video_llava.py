"""Video-LLaVA: images as in LLaVA-1.5, and videos that go through a tower of their own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from pore.cost.decoders import DecoderShape
from pore.cost.shapes import ModelShape
from pore.families.base import Family, Noise
from pore.families.llava import Llava
from pore.layout import Tiling


class VideoLlava(Llava):
    """`VideoLlavaForConditionalGeneration`: two CLIP-like towers, one projector, LLaMA decoder.

    A frame of a video is its CLS token and its patches; all of them are visual tokens.
    """

    name = "Video-LLaVA"
    model_types: ClassVar[tuple[str, ...]] = ("video_llava",)
    encodes_videos = True

    @property
    def of_videos(self) -> Family:
        """Frames go through a tower of their own, and their CLS tokens are visual tokens."""
        return _Frames()

    def tower(self, model: nn.Module) -> nn.Module:
        """The vision tower of images."""
        return self.base(model).image_tower  # type: ignore[return-value]

    def inputs(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The arguments of a call of `base(model)`, by name.

        `pixel_values` are called `pixel_values_images` in older versions of transformers.
        """
        named = super().inputs(model, args, kwargs)
        if "pixel_values_images" in named:
            named["pixel_values"] = named.pop("pixel_values_images")
        return named

    def pixels_name(self, model: nn.Module) -> str:
        """`pixel_values`, but in older versions of transformers `pixel_values_images`."""
        named = inspect.signature(type(self.base(model)).forward).parameters
        return "pixel_values_images" if "pixel_values_images" in named else "pixel_values"

    def example(self, model: nn.Module, noise: Noise) -> tuple[list[int], dict[str, Tensor]]:
        """One image."""
        ids, inputs = super().example(model, noise)
        inputs[self.pixels_name(model)] = inputs.pop("pixel_values")
        return ids, inputs

    def video_tilings(self, model: nn.Module, inputs: Mapping[str, Any]) -> list[Tiling]:
        """Frame by frame: the CLS token, and the patches row by row."""
        height, width = self.grid(model)
        videos = inputs["pixel_values_videos"]
        tokens, frames = height * width + int(self.tower_has_cls(model)), videos.shape[1]
        slots = tuple(range(frames * tokens))
        tiling = Tiling(frames, None, tokens, slots, apart=True, of_frames=True)
        return [tiling] * len(videos)

    def shape(self, config: Any, decoder: DecoderShape) -> ModelShape:
        """As LLaVA; a frame keeps its CLS token."""
        shape = super().shape(config, decoder)
        assert shape.tower is not None
        return replace(shape, frame_tokens=shape.tower.tokens)


class _Frames(VideoLlava):
    """Frames of videos."""

    keeps_cls = True

    def tower(self, model: nn.Module) -> nn.Module:
        """The vision tower of videos."""
        return self.base(model).video_tower  # type: ignore[return-value]
