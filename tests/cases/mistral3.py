"""Mistral 3, Pixtral and LightOnOCR: rows of an image that end with a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from cases.base import TOWER, Case, noise, of, text_config


class Mistral3(Case):
    """Every row of an image ends with a token, the last one with another."""

    name = "Mistral 3"
    merge = 2
    grids = ((4, 6), (3, 3))
    text, sizes = "MistralConfig", {"sliding_window": None}

    def build(self) -> Any:
        config = transformers.Mistral3Config(
            text_config=text_config(self.text, **self.sizes).to_dict(),
            vision_config=self.tower(),
            image_token_index=100,
            vision_feature_layer=-1,
            spatial_merge_size=self.merge,
        )
        kind = transformers.Mistral3ForConditionalGeneration
        return kind._from_config(config, dtype=torch.float64)

    def tower(self) -> dict[str, Any]:
        return {"model_type": "pixtral", **TOWER, "image_size": 64}

    def image_ids(self, image: int) -> list[int]:
        height, width = self.grids[image % 2]
        return [*([*[100] * width, 101] * height)[:-1], 102]

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        """Images are padded to the largest."""
        sizes = [[4 * self.merge * side for side in self.grids[i % 2]] for i in images]
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        pixels = torch.zeros(len(images), 3, height, width, dtype=torch.float64)
        for one, i, size in zip(pixels, images, sizes, strict=True):
            one[:, : size[0], : size[1]] = noise(i, 3, *size)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


class Pixtral(Mistral3):
    """A LLaVA with another tower."""

    name = "Pixtral"
    merge = 1

    def build(self) -> Any:
        config = transformers.LlavaConfig(
            text_config=text_config(self.text, **self.sizes).to_dict(),
            vision_config=self.tower(),
            image_token_index=100,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
        kind = transformers.LlavaForConditionalGeneration
        return kind._from_config(config, dtype=torch.float64)


class Ministral3(Mistral3):
    """Queries are scaled by their positions, here from the 16th on."""

    name = "Ministral 3"
    cousin = True
    text = "Ministral3Config"
    sizes: dict[str, Any] = {  # noqa: RUF012
        "sliding_window": None,
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 32.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
        },
    }


class Mistral4(Ministral3):
    """The cache holds latent states that all heads share; a mixture of experts."""

    name = "Mistral 4"
    cousin = True
    text = "Mistral4Config"
    sizes: dict[str, Any] = {  # noqa: RUF012
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "rope_parameters": Ministral3.sizes["rope_parameters"] | {"partial_rotary_factor": 0.5},
    }

    def build(self) -> Any:
        model = super().build()
        # Grouped matrix products do not support float64.
        model.set_experts_implementation("eager")
        return model


class LightOnOcr(Mistral3):
    """Rows of an image follow one another."""

    name = "LightOnOCR"
    cousin = True
    text, sizes = "Qwen3Config", {"head_dim": 8}

    def build(self) -> Any:
        config = transformers.LightOnOcrConfig(
            text_config=text_config(self.text, **self.sizes).to_dict(),
            vision_config=self.tower(),
            image_token_id=100,
            spatial_merge_size=self.merge,
        )
        kind = transformers.LightOnOcrForConditionalGeneration
        return kind._from_config(config, dtype=torch.float64)

    def image_ids(self, image: int) -> list[int]:
        height, width = self.grids[image % 2]
        return [100] * (height * width)


PUBLISHED = {
    "Mistral 3": of("Mistral3Config"),
    "Ministral 3": lambda: transformers.Mistral3Config(text_config=transformers.Ministral3Config()),
    "Mistral 4": lambda: transformers.Mistral3Config(text_config=transformers.Mistral4Config()),
    "Pixtral": lambda: transformers.LlavaConfig(
        text_config=transformers.MistralConfig(sliding_window=None),
        vision_config=transformers.PixtralVisionConfig(),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    "LightOnOCR": of("LightOnOcrConfig"),
}
