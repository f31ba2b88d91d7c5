"""Shapes of models known by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from pore.cost.decoders import DecoderShape
from pore.cost.shapes import ModelShape
from pore.cost.towers import TowerShape
from pore.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import LlavaConfig


def _llama(hidden: int, layers: int, head_dim: int) -> DecoderShape:
    """A LLaMA decoder: MLP of 8/3 the width, rounded up to a multiple of 256 as in LLaMA."""
    return DecoderShape(
        hidden=hidden,
        intermediate=-(-8 * hidden // (3 * 256)) * 256,
        layers=layers,
        heads=hidden // head_dim,
        kv_heads=hidden // head_dim,
        head_dim=head_dim,
        vocab=32064,
        gated=True,
    )


# openai/clip-vit-large-patch14-336, and a tower of the same 24 x 24 grid at 1.4 % of its FLOPs.
_VIT_L = TowerShape(
    hidden=1024, intermediate=4096, layers=24, heads=16, image_size=336, patch_size=14
)


_SMALL_TOWER = replace(_VIT_L, hidden=256, intermediate=1024, layers=4, heads=4)


def _llava(decoder: DecoderShape, tower: TowerShape) -> ModelShape:
    projector = decoder.hidden * (tower.hidden + decoder.hidden)
    return ModelShape(decoder, tower, projector, tower.patches)


SHAPES: Mapping[str, ModelShape] = MappingProxyType(
    {
        "llava-1.5-7b": _llava(_llama(hidden=4096, layers=32, head_dim=128), _VIT_L),
        "llava-1.5-13b": _llava(_llama(hidden=5120, layers=40, head_dim=128), _VIT_L),
    }
)
"""Shapes of published checkpoints: llava-hf/llava-1.5-7b-hf and -13b-hf."""

_CUSTOM = re.compile(r"llava-([1-9]\d*)x([1-9]\d*)(-vit-l)?")


def model_shape(name: str) -> ModelShape:
    """The sizes that a name stands for.

    Args:
        name: A name in `SHAPES`, or `llava-WIDTHxLAYERS` for a LLaVA with a LLaMA decoder of that
            width and depth, such as `llava-1024x12`: heads of 128 from width 2048 on where that
            divides, of 64 otherwise, 576 visual tokens on the 24 x 24 grid of CLIP ViT-L/14-336
            from a small tower (4 layers, width 256). `llava-1024x12-vit-l` has the full ViT-L
            tower instead.

    Raises:
        UnsupportedModelError: The name stands for no shape.
    """
    if name in SHAPES:
        return SHAPES[name]
    match = _CUSTOM.fullmatch(name)
    if match is None or int(match[1]) % 64:
        raise UnsupportedModelError(
            f"{name!r} is not a shape; use one of {', '.join(SHAPES)}, or llava-WIDTHxLAYERS "
            "with a width that is a multiple of 64, such as llava-1024x12 "
            "(llava-1024x12-vit-l for the full CLIP ViT-L tower)"
        )
    width, layers = int(match[1]), int(match[2])
    head_dim = 128 if width >= 2048 and width % 128 == 0 else 64
    return _llava(_llama(width, layers, head_dim), _VIT_L if match[3] else _SMALL_TOWER)


def llava_config(name: str) -> LlavaConfig:
    """A full `LlavaConfig` of a named shape, to build a model with random weights from.

    Token ids, norms and the feature layer are those of llava-hf/llava-1.5-7b-hf.

    Args:
        name: As in `model_shape`.

    Raises:
        UnsupportedModelError: The name stands for no shape.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    shape = model_shape(name)
    decoder, tower = shape.decoder, shape.tower
    assert tower is not None
    return LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=decoder.hidden,
            intermediate_size=decoder.intermediate,
            num_hidden_layers=decoder.layers,
            num_attention_heads=decoder.heads,
            num_key_value_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            vocab_size=decoder.vocab,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            pad_token_id=32001,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=tower.hidden,
            intermediate_size=tower.intermediate,
            num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads,
            image_size=tower.image_size,
            patch_size=tower.patch_size,
            num_channels=tower.channels,
            projection_dim=768,
        ),
        image_token_index=32000,
        image_seq_length=shape.visual_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
