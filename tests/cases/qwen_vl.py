"""Qwen2-VL to Qwen3.5: images of any size, positions on three axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from cases.base import LAYERS, Case, noise, of, since, text_config

EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}

TOWER: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "initializer_range": 0.3,
}
LATER_TOWER = TOWER | {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32}


class Qwen2VL(Case):
    name = "Qwen2-VL"
    config, kind = "Qwen2VLConfig", "Qwen2VLForConditionalGeneration"
    text = "Qwen2VLTextConfig"
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}  # noqa: RUF012
    sizes: dict[str, Any] = {}  # noqa: RUF012
    grids = ((1, 8, 12), (1, 6, 6))
    video_grids = ((2, 4, 6), (3, 4, 4))
    videos = "mixed"
    vision: dict[str, Any] = TOWER | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}

    def build(self) -> Any:
        config = getattr(transformers, self.config)(
            text_config=text_config(self.text, rope_parameters=self.rope, **self.sizes).to_dict(),
            vision_config=dict(self.vision),  # 5.16 writes into it
            image_token_id=100,
            video_token_id=101,
            vision_start_token_id=102,
            vision_end_token_id=103,
        )
        kind = getattr(transformers, self.kind)
        # Grouped matrix products do not support float64.
        return kind._from_config(config, dtype=torch.float64, experts_implementation="eager")

    def image_ids(self, image: int) -> list[int]:
        frames, height, width = self.grids[image % 2]
        return [102, *[100] * (frames * height * width // 4), 103]

    def video_ids(self, video: int) -> list[int]:
        frames, height, width = self.video_grids[video % 2]
        return [102, *[101] * (frames * height * width // 4), 103]

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        grids = [self.grids[i % 2] for i in images]
        return {"pixel_values": self.pixels(images, grids), "image_grid_thw": torch.tensor(grids)}

    def encode_videos(self, videos: Sequence[int]) -> dict[str, Tensor]:
        grids = [self.video_grids[i % 2] for i in videos]
        pixels = self.pixels([50 + i for i in videos], grids)
        return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor(grids)}

    def pixels(self, seeds: Sequence[int], grids: Sequence[tuple[int, int, int]]) -> Tensor:
        size = 3 * self.vision["temporal_patch_size"] * self.vision["patch_size"] ** 2
        each = zip(seeds, grids, strict=True)
        return torch.cat([noise(seed, t * h * w, size) for seed, (t, h, w) in each])

    def extra(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == 100).int() + 2 * (ids == 101).int()}


class Qwen25VL(Qwen2VL):
    """The tower attends in windows of 2 x 2 tokens, in its last block to the whole image."""

    name = "Qwen2.5-VL"
    config, kind = "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration"
    text = "Qwen2_5_VLTextConfig"
    vision = LATER_TOWER | {"window_size": 16, "fullatt_block_indexes": [1]}


class Qwen3VL(Qwen2VL):
    """Three decoder layers add features of lower tower blocks; methods prune before and within."""

    name = "Qwen3-VL"
    deepstack = True
    config, kind = "Qwen3VLConfig", "Qwen3VLForConditionalGeneration"
    text = "Qwen3VLTextConfig"
    vision = LATER_TOWER | {
        "depth": 4,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1, 2],
    }

    def video_ids(self, video: int) -> list[int]:
        frames, height, width = self.video_grids[video % 2]
        return [
            i for t in range(frames) for i in (30 + t, 102, *[101] * (height * width // 4), 103)
        ]


class Qwen35(Qwen3VL):
    """Every other decoder layer is recurrent, in float32."""

    name = "Qwen3.5"
    beams = since("5.21") or not since("5.18")  # between, it got features of images wrong
    close = 5e-4
    deepstack = False
    config, kind = "Qwen3_5Config", "Qwen3_5ForConditionalGeneration"
    text = "Qwen3_5TextConfig"
    sizes: dict[str, Any] = {  # noqa: RUF012
        "initializer_range": 0.2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2),
    }
    rope = Qwen3VL.rope | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    vision = {k: v for k, v in Qwen3VL.vision.items() if k[:9] != "deepstack"}  # noqa: RUF012


class Qwen3VLMoE(Qwen3VL):
    name = "Qwen3-VL-MoE"
    cousin = True
    config, kind = "Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration"
    text, sizes = "Qwen3VLMoeTextConfig", EXPERTS


class Qwen35MoE(Qwen35):
    name = "Qwen3.5-MoE"
    cousin = True
    config, kind = "Qwen3_5MoeConfig", "Qwen3_5MoeForConditionalGeneration"
    text = "Qwen3_5MoeTextConfig"
    sizes = Qwen35.sizes | EXPERTS | {"shared_expert_intermediate_size": 16}


MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


PUBLISHED = {
    "Qwen2-VL": of("Qwen2VLConfig"),
    "Qwen2.5-VL": of("Qwen2_5_VLConfig"),
    "Qwen2.5-VL with sections": of("Qwen2_5_VLConfig", text_config={"rope_parameters": MROPE}),
    "Qwen3-VL": of("Qwen3VLConfig"),
    "Qwen3-VL-MoE": of("Qwen3VLMoeConfig"),
    "Qwen3.5": of("Qwen3_5Config"),
    "Qwen3.5-MoE": of("Qwen3_5MoeConfig"),
}
