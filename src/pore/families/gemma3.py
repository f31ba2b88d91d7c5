"""Gemma 3: tokens of an image see each other, and most layers have a sliding window."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pore._compat.masks import own_masks
from pore.cost.decoders import DecoderShape
from pore.cost.reading import size
from pore.cost.shapes import ModelShape
from pore.cost.towers import tower_of
from pore.families.base import Family


class Gemma3(Family):
    """`Gemma3ForConditionalGeneration`: SigLIP tower, patches averaged to `mm_tokens_per_image`.

    Layers with a sliding window have rotary tables of their own.
    """

    name = "Gemma 3"
    model_types = ("gemma3",)
    token_types = "token_type_ids"
    tower_refusal = None
    merged = True

    def token_features(self, model: nn.Module) -> nn.Module:
        """The norm after the average."""
        projector: Any = self.projector(model)
        return projector.mm_soft_emb_norm  # type: ignore[no-any-return]

    def merge_size(self, model: nn.Module) -> int:
        """How many patches are averaged along a side, as 4 of 64."""
        config: Any = model.config
        vision = config.vision_config
        return int(vision.image_size // vision.patch_size // self.grid(model)[0])

    def rotary(self, model: nn.Module, hidden: Tensor, positions: Tensor, layer: int) -> Any:
        """Rotary tables of the layer's kind."""
        decoder: Any = self.decoder(model)
        return decoder.rotary_emb(hidden, positions, decoder.config.layer_types[layer])

    def masks(
        self, model: nn.Module, embeds: Tensor, tokens: Tensor, cache: Any, types: Tensor
    ) -> Any:
        """The model's own masks, by kind of layer."""
        from transformers import Gemma3ForConditionalGeneration

        return own_masks(
            Gemma3ForConditionalGeneration,
            model.config,
            embeds,
            tokens,
            cache,
            token_type_ids=types,
        )

    def shape(self, config: Any, decoder: DecoderShape) -> ModelShape:
        """One matrix on means of squares of patches."""
        tower, tokens = tower_of(config), size(config, "mm_tokens_per_image")
        merge = tower.side // round(tokens**0.5)
        return ModelShape(decoder, tower, tower.hidden * decoder.hidden, tokens, merge)

    def grid(self, model: nn.Module) -> tuple[int, int]:
        """The grid of averages, as of 256 tokens: (16, 16)."""
        config: Any = model.config
        side = int(config.mm_tokens_per_image**0.5)
        return side, side
