"""A LLaVA around the vision tower of a golden file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import pore
from pore.pruner import Run
from pore.tower import TowerView

IMAGE = 7


def llava_of(
    vision: dict[str, Any], weights: dict[str, Tensor], projector: nn.Module, width: int
) -> LlavaForConditionalGeneration:
    """A model with the file's tower and projector, and any decoder.

    Args:
        vision: The file's CLIP configuration.
        weights: CLIP weights by their names in transformers, with or without `vision_model.`.
        projector: What stands between tower and decoder.
        width: Hidden size of the decoder.
    """
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=16,
            hidden_size=width,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        ),
        vision_config=CLIPVisionConfig(**vision),
        image_token_index=IMAGE,
    )
    model = LlavaForConditionalGeneration._from_config(config, dtype=torch.float32).eval()
    tower = model.model.vision_tower
    prefix = "vision_model." if hasattr(tower, "vision_model") else ""
    weights = {prefix + k.removeprefix("vision_model."): v for k, v in weights.items()}
    missing, unexpected = tower.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("position_ids") for name in missing), missing
    model.model.multi_modal_projector = projector
    return model


def visual_embeddings(
    model: LlavaForConditionalGeneration, pruner: pore.Pruner, pixels: Tensor
) -> tuple[Tensor, Run]:
    """What the decoder gets of every image, (B, k, D), and the run.

    Args:
        model: The model.
        pruner: The method.
        pixels: (B, 3, H, W) pixel values, one image for each of B prompts.
    """
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    ids = torch.tensor([[1, *[IMAGE] * patches, 2, 3]] * len(pixels))
    seen: list[Tensor] = []

    def look(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    first = model.model.language_model.layers[0]
    with torch.no_grad(), pruner(model) as run:
        hook = first.register_forward_pre_hook(look, with_kwargs=True)
        model(input_ids=ids, pixel_values=pixels)
        hook.remove()
    return seen[0][:, 1:-2], run


def tower_view(features: Tensor, attention: Tensor, **others: Any) -> TowerView:
    """What a tower rule sees, of features (I, N, C) and attention (S, I, H, N) given by hand."""
    raster = torch.arange(features.shape[1]).expand(len(features), -1)
    parts = {"cls_feature": None, "queries": (), "keys": (), **others}
    return TowerView(features=features, cls_attention=attention, raster=raster, **parts)
