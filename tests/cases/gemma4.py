"""Gemma 4: images of any size, layers that share keys."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from cases.base import LAYERS, Case, noise, since, text_config

IDS = {
    "image_token_id": 100,
    "video_token_id": 101,
    "audio_token_id": 102,
    "boi_token_id": 103,
    "eoi_token_id": 104,
}


class Gemma4(Case):
    """A small model: inputs for every layer, and the last two layers use keys of layers 2 and 3."""

    name = "Gemma 4"
    counted = False
    grids = ((2, 6), (3, 3))
    ragged = (
        "num_frames_per_video" in inspect.signature(transformers.Gemma4Model.forward).parameters
    )
    """Whether videos may have several lengths."""
    # transformers 5.20 accepts them, but does not pass them to the code that needs them.
    lost = ragged and "num_frames_per_video=" not in inspect.getsource(
        transformers.Gemma4Model.forward
    )
    videos = None if lost else "mixed"
    video_grids = ((2, 2, 3), (3 if ragged else 2, 2, 2))
    patches, values, side = 48, 48, 2
    """The most patches of an image, numbers in each, and patches along a token's side."""
    window = 32
    sizes: dict[str, Any] = {  # noqa: RUF012
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 120,
        "use_double_wide_mlp": True,
    }

    def decoder(self, kind: str, **more: Any) -> Any:
        """The decoder's sizes."""
        return text_config(
            kind,
            head_dim=8,
            global_head_dim=16,
            sliding_window=self.window,
            layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
            **more,
        )

    def build(self) -> Any:
        config = transformers.Gemma4Config(
            text_config=self.decoder("Gemma4TextConfig", **self.sizes),
            vision_config=transformers.Gemma4VisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
                patch_size=4,
                pooling_kernel_size=2,
                position_embedding_size=16,
                initializer_range=0.3,
            ),
            **IDS,
        )
        kind = transformers.Gemma4ForConditionalGeneration
        # Grouped matrix products do not support float64.
        model = kind._from_config(config, dtype=torch.float64, experts_implementation="eager")
        nn.init.normal_(model.model.vision_tower.patch_embedder.position_embedding_table, std=0.3)
        return model

    def image_ids(self, image: int) -> list[int]:
        height, width = self.grids[image % 2]
        return [103, *[100] * (height * width), 104]

    def video_ids(self, video: int) -> list[int]:
        frames, height, width = self.video_grids[video % 2]
        return [i for t in range(frames) for i in (30 + t, 103, *[101] * (height * width), 104)]

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        pixels, positions = self.pixels(images, [self.grids[i % 2] for i in images])
        return {"pixel_values": pixels, "image_position_ids": positions}

    def encode_videos(self, videos: Sequence[int]) -> dict[str, Tensor]:
        sizes = [self.video_grids[i % 2] for i in videos]
        frames = [(height, width) for count, height, width in sizes for _ in range(count)]
        seeds = [
            50 + 10 * i + t for i, size in zip(videos, sizes, strict=True) for t in range(size[0])
        ]
        pixels, positions = self.pixels(seeds, frames)
        if not self.ragged:
            shape = (len(videos), -1, self.patches)
            pixels, positions = pixels.view(*shape, self.values), positions.view(*shape, 2)
            return {"pixel_values_videos": pixels, "video_position_ids": positions}
        return {
            "pixel_values_videos": pixels,
            "video_position_ids": positions,
            "num_frames_per_video": torch.tensor([count for count, *_ in sizes]),
        }

    def pixels(
        self, seeds: Sequence[int], grids: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Patches and where they lie, (x, y), filled up to the most that an image may have."""
        pixels = torch.zeros(len(grids), self.patches, self.values, dtype=torch.float64)
        positions = torch.full((len(grids), self.patches, 2), -1)
        for i, (seed, (height, width)) in enumerate(zip(seeds, grids, strict=True)):
            rows, columns = (torch.arange(self.side * n) for n in (height, width))
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            count = x.numel()
            positions[i, :count] = torch.stack([x.flatten(), y.flatten()], -1)
            pixels[i, :count] = noise(seed, count, self.values)
        return pixels, positions

    def extra(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == 100).int() + 2 * (ids == 101).int()}


class Gemma4MoE(Gemma4):
    """A large model: images see themselves in layers with windows; in others, keys are values."""

    name = "Gemma 4 with experts"
    static = since("5.23")  # 5.16 makes other masks for it
    sizes: dict[str, Any] = {  # noqa: RUF012
        "use_bidirectional_attention": "vision",
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    }


class Gemma4Unified(Gemma4):
    """Without a tower; images see themselves in every layer."""

    name = "Gemma 4 Unified"
    cousin = True
    static = False  # its masks for static caches are not those of its forward
    side = 1
    patches, values = 12, 192

    def build(self) -> Any:
        config = transformers.Gemma4UnifiedConfig(
            text_config=self.decoder(
                "Gemma4UnifiedTextConfig", use_bidirectional_attention="vision"
            ),
            vision_config=transformers.Gemma4UnifiedVisionConfig(
                patch_size=4,
                pooling_kernel_size=2,
                mm_embed_dim=16,
                mm_posemb_size=16,
                output_proj_dims=16,
                initializer_range=0.3,
            ),
            **IDS,
        )
        kind = transformers.Gemma4UnifiedForConditionalGeneration
        model = kind._from_config(config, dtype=torch.float64)
        nn.init.normal_(model.model.embed_vision.pos_embedding, std=0.3)
        return model


def _small() -> Any:
    decoder = transformers.Gemma4TextConfig(num_kv_shared_layers=10, use_double_wide_mlp=True)
    vision = transformers.Gemma4VisionConfig()
    return transformers.Gemma4Config(text_config=decoder, vision_config=vision)


def _with_experts() -> Any:
    decoder = transformers.Gemma4TextConfig(
        use_bidirectional_attention="vision",
        attention_k_eq_v=True,
        num_global_key_value_heads=2,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    )
    vision = transformers.Gemma4VisionConfig()
    return transformers.Gemma4Config(text_config=decoder, vision_config=vision)


PUBLISHED = {
    "Gemma 4": _small,
    "Gemma 4 with experts": _with_experts,
    "Gemma 4 Unified": lambda: transformers.Gemma4UnifiedConfig(
        vision_config=transformers.Gemma4UnifiedVisionConfig()
    ),
}
