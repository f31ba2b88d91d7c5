"""Video-LLaVA: images and videos, each with its own tower."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from cases.base import TOWER, Case, noise, of, text_config
from helpers.models import IMAGE, in_float64


class VideoLlava(Case):
    """Frames have a CLS token."""

    name = "Video-LLaVA"
    videos = "mixed"

    def build(self) -> Any:
        config = transformers.VideoLlavaConfig(
            text_config=text_config("LlamaConfig").to_dict(),
            vision_config={"model_type": "clip_vision_model", **TOWER, "patch_size": 8}
            | {"num_hidden_layers": 4, "projection_dim": 16},
            image_token_index=IMAGE,
            video_token_index=101,
        )
        kind = transformers.VideoLlavaForConditionalGeneration
        return in_float64(kind._from_config(config, dtype=torch.float64))

    def image_ids(self, image: int) -> list[int]:
        return [IMAGE] * 16

    def video_ids(self, video: int) -> list[int]:
        return [101] * (2 * 17)

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        named = inspect.signature(self.model().model.forward).parameters
        name = "pixel_values" if "pixel_values" in named else "pixel_values_images"
        return {name: torch.stack([noise(i, 3, 32, 32) for i in images])}

    def encode_videos(self, videos: Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values_videos": torch.stack([noise(50 + i, 2, 3, 32, 32) for i in videos])}


PUBLISHED = {
    "Video-LLaVA": of("VideoLlavaConfig"),
}
