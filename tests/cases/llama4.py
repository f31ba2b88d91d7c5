"""Llama 4: tiles with separators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from cases.base import Case, noise, of, since, text_config


def _lend_llama4_what_it_lacks() -> None:
    """Let Llama 4 run on transformers 5.24.0, where it fails unpruned too.

    Its forward reads `image_outputs` of its decoder's output, which has none.
    """
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    if since("5.24") and not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
        MoeCausalLMOutputWithPast.image_outputs = None


class Llama4(Case):
    """Image 0 is two tiles and the whole view, image 1 the whole view alone."""

    name = "Llama 4"
    tiled = True
    beams = False
    static = since("5.20")
    sizes: dict[str, Any] = {}  # noqa: RUF012

    def build(self) -> Any:
        tower = {
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "initializer_range": 0.3,
        }
        text = text_config(
            "Llama4TextConfig",
            head_dim=8,
            intermediate_size_mlp=48,
            num_local_experts=4,
            interleave_moe_layer_step=2,
            **self.sizes,
        )
        config = transformers.Llama4Config(
            text_config=text.to_dict(),
            vision_config=tower,
            boi_token_index=101,
            eoi_token_index=102,
            image_token_index=100,
        )
        kind = transformers.Llama4ForConditionalGeneration
        _lend_llama4_what_it_lacks()
        return kind._from_config(config, dtype=torch.float64)

    def image_ids(self, image: int) -> list[int]:
        tile = [100] * 16
        tiles = [] if image % 2 else [*tile, 103, *tile, 104]
        return [101, *tiles, 105, *tile, 102]

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        tiles = [noise(10 * i + k, 3, 32, 32) for i in images for k in range(1 if i % 2 else 3)]
        return {"pixel_values": torch.stack(tiles)}


PUBLISHED = {
    "Llama 4": of("Llama4Config"),
}
