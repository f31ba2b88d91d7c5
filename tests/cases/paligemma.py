"""PaliGemma and PaliGemma 2: all tokens of a prompt see each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from cases.base import TOWER, Case, noise, of, text_config


class PaliGemma(Case):
    name = "PaliGemma"
    text = "GemmaConfig"
    sizes: dict[str, Any] = {}  # noqa: RUF012
    kernel: str | None = None

    def build(self) -> Any:
        config = transformers.PaliGemmaConfig(
            text_config=text_config(self.text, head_dim=8, **self.sizes).to_dict(),
            vision_config={
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
                **TOWER,
                "patch_size": 8,
            },
            projection_dim=32,
            hidden_size=32,
            image_token_index=100,
        )
        kind = transformers.PaliGemmaForConditionalGeneration
        return kind._from_config(config, dtype=torch.float64, attn_implementation=self.kernel)

    def image_ids(self, image: int) -> list[int]:
        return [100] * 16

    def encode(self, images: Sequence[int]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([noise(i, 3, 32, 32) for i in images])}

    def extra(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": torch.zeros_like(ids)}

    def answered(self, ids: Tensor, mask: Tensor, count: int) -> dict[str, Tensor]:
        """Tokens of the answer are not among those that see each other."""
        answered = torch.arange(ids.shape[1]) >= ids.shape[1] - count
        return {"token_type_ids": answered.long().expand_as(ids)}


class PaliGemma2(PaliGemma):
    """Every other layer has a sliding window, shorter than the prompts, and logits are capped."""

    name = "PaliGemma 2"
    static = False
    text = "Gemma2Config"
    sizes: dict[str, Any] = {  # noqa: RUF012
        "query_pre_attn_scalar": 4,
        "sliding_window": 16,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 30.0,
    }
    kernel = "eager"  # older transformers take SDPA, which silently ignores the cap


PUBLISHED = {
    "PaliGemma": of("PaliGemmaConfig"),
    "PaliGemma 2": lambda: transformers.PaliGemmaConfig(text_config=transformers.Gemma2Config()),
}
