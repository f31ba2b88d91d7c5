"""PaliGemma and PaliGemma 2: all tokens of a prompt see each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pore._compat.masks import own_masks
from pore.cost.decoders import DecoderShape
from pore.cost.shapes import ModelShape
from pore.cost.towers import tower_of
from pore.families.base import Family


class PaliGemma(Family):
    """`PaliGemmaForConditionalGeneration`: SigLIP tower, one linear projection, Gemma or Gemma 2.

    Gemma 2 caps the logits of its attention, and every other layer has a sliding window, which
    within a prompt hides nothing.
    """

    name = "PaliGemma"
    model_types = ("paligemma",)
    token_types = "token_type_ids"
    first_position = 1
    tower_refusal = None

    def masks(
        self, model: nn.Module, embeds: Tensor, tokens: Tensor, cache: Any, types: Tensor
    ) -> Any:
        """The model's own masks, by kind of layer for Gemma 2."""
        from transformers import PaliGemmaForConditionalGeneration

        return own_masks(
            PaliGemmaForConditionalGeneration,
            model.config,
            embeds,
            tokens,
            cache,
            token_type_ids=types,
        )

    def prompt_types(self, model: nn.Module, ids: Tensor, answer: int) -> dict[str, Tensor]:
        """The tokens of a prompt see each other, those of an answer what came before them."""
        answered = torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - answer
        return {"token_type_ids": answered.long().expand_as(ids)}

    def shape(self, config: Any, decoder: DecoderShape) -> ModelShape:
        """One matrix."""
        tower = tower_of(config)
        return ModelShape(decoder, tower, tower.hidden * decoder.hidden, tower.patches)

    def grid(self, model: nn.Module) -> tuple[int, int]:
        """The patch grid of the tower, as for 224 pixels and patches of 14: (16, 16)."""
        vision: Any = model.config.vision_config  # type: ignore[union-attr]
        side = vision.image_size // vision.patch_size
        return side, side
