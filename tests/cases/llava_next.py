"""LLaVA-NeXT, LLaVA-OneVision and LLaVA-NeXT-Video: tiles whose padding is cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from cases.base import Case, noise, of, text_config
from helpers.models import IMAGE, in_float64


class LlavaNext(Case):
    name = "LLaVA-NeXT"
    config, kind = "LlavaNextConfig", "LlavaNextForConditionalGeneration"
    text, tower = "LlamaConfig", "clip_vision_model"
    tiled = True
    sizes = ((60, 50), (20, 60))

    def build(self) -> Any:
        tower = {
            "model_type": self.tower,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 16,
            "vision_use_head": False,
            "initializer_range": 0.3,
        }
        config = getattr(transformers, self.config)(
            text_config=text_config(self.text).to_dict(),
            vision_config=tower,
            image_token_index=IMAGE,
            video_token_index=101,
            image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
        )
        kind = getattr(transformers, self.kind)
        return in_float64(kind._from_config(config, dtype=torch.float64))

    def image_ids(self, image: int) -> list[int]:
        return [IMAGE] * (72, 34)[image % 2]

    def content(self, image: int) -> list[bool]:
        rows, columns = ((8, 6), (4, 8))[image % 2]
        base = [True] * 16
        if image % 2:  # 20 x 60 on 32 x 64: 21 pixels high, so rows 0 and 3 show nothing else
            rows = 2
        return base + ([True] * columns + [False]) * rows

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        pixels = torch.stack([noise(i, 5, 3, 32, 32) for i in images])
        sizes = torch.tensor([self.sizes[i % 2] for i in images])
        return {"pixel_values": pixels, "image_sizes": sizes}


class LlavaOnevision(LlavaNext):
    name = "LLaVA-OneVision"
    config, kind = "LlavaOnevisionConfig", "LlavaOnevisionForConditionalGeneration"
    text, tower = "Qwen2Config", "siglip_vision_model"
    videos = "mixed"

    def video_ids(self, video: int) -> list[int]:
        return [101] * 9

    def video_content(self, video: int) -> list[bool]:
        return [True] * (len(self.video_ids(video)) - 1) + [False]

    def encode_videos(self, videos: Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values_videos": torch.stack([noise(50 + i, 2, 3, 32, 32) for i in videos])}


class LlavaNextVideo(LlavaOnevision):
    name = "LLaVA-NeXT-Video"
    cousin = True
    config, kind = "LlavaNextVideoConfig", "LlavaNextVideoForConditionalGeneration"
    text, tower = "LlamaConfig", "clip_vision_model"

    def video_ids(self, video: int) -> list[int]:
        return [101] * 8

    def video_content(self, video: int) -> list[bool]:
        return [True] * 8


PUBLISHED = {
    "LLaVA-NeXT": of("LlavaNextConfig"),
    "LLaVA-NeXT with Mistral": lambda: transformers.LlavaNextConfig(
        text_config=transformers.MistralConfig(sliding_window=4096)
    ),
    "LLaVA-OneVision": of("LlavaOnevisionConfig"),
    "LLaVA-NeXT-Video": of("LlavaNextVideoConfig"),
}
