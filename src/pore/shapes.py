"""Sizes of vision-language models, without the models: for FLOPs, and for random-weight stand-ins.

A shape is read from a transformers config (`ModelShape.from_config`) or looked up by name
(`model_shape("llava-1.5-7b")`), and a name can be turned back into a full config
(`llava_config`), from which a model with random weights can be built to measure speed without a
checkpoint. transformers is imported only by `llava_config`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pore.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import LlavaConfig

# Decoders by `model_type`: whether the MLP is gated (three matrices instead of two).
_DECODERS: Mapping[str, bool] = MappingProxyType({"llama": True, "mistral": True, "qwen2": True})
# Towers by `model_type`: tokens that are put before the patches (a CLS token).
_TOWERS: Mapping[str, int] = MappingProxyType({"clip_vision_model": 1, "siglip_vision_model": 0})
_FAMILIES = ("llava", "llava_next", "llava_onevision")


def _model_type(config: object, part: str, known: tuple[str, ...]) -> str:
    """The config's `model_type`, refused when it is not in `known`."""
    model_type = getattr(config, "model_type", None)
    if model_type not in known:
        raise UnsupportedModelError(
            f"the sizes of this {part} cannot be read: its config is a "
            f"{type(config).__name__} with model_type {model_type!r}; "
            f"known here: {', '.join(known)}"
        )
    return str(model_type)


def _part(config: object, name: str) -> object:
    """A sub-config such as `text_config`, refused when there is none."""
    part = getattr(config, name, None)
    if part is None:
        raise UnsupportedModelError(
            f"{type(config).__name__} has no {name}; pass the config of the whole model"
        )
    return part


def _size(config: object, name: str, default: int | None = None) -> int:
    """A positive whole number from the config; `default` stands for a value of None."""
    value = getattr(config, name, None)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnsupportedModelError(
            f"{type(config).__name__}.{name} must be a whole number of at least 1, is {value!r}"
        )
    return value


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder (the language model), as its FLOPs need them.

    Attributes:
        hidden: Width of the residual stream, d.
        intermediate: Width of the MLP, m.
        layers: Number of decoder layers.
        heads: Query heads of a layer.
        kv_heads: Key and value heads of a layer; fewer than `heads` with grouped queries.
        head_dim: Width of one head; `heads * head_dim` need not be `hidden`.
        vocab: Rows of the output head.
        gated: Whether the MLP has three matrices (gate, up, down) rather than two.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: bool

    @classmethod
    def from_config(cls, config: object) -> DecoderShape:
        """Read the sizes from the decoder's config (`text_config` of a vision-language model).

        Args:
            config: A transformers config of type llama, mistral or qwen2.

        Raises:
            UnsupportedModelError: The config is of another type, or a size is missing from it.
        """
        model_type = _model_type(config, "decoder", tuple(_DECODERS))
        hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
        return cls(
            hidden=hidden,
            intermediate=_size(config, "intermediate_size"),
            layers=_size(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=_size(config, "num_key_value_heads", default=heads),
            head_dim=_size(config, "head_dim", default=hidden // heads),
            vocab=_size(config, "vocab_size"),
            gated=_DECODERS[model_type],
        )


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a vision tower: a transformer over square patches, with an MLP of two matrices.

    Attributes:
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        layers: Number of layers. transformers runs all of them, also those above the layer whose
            features are used.
        heads: Attention heads of a layer.
        image_size: Side of the square image, in pixels.
        patch_size: Side of a patch, in pixels.
        channels: Colour channels.
        prefix_tokens: Tokens before the patches: 1 for CLIP's CLS token.
        pooling: Whether a query is attended to all patches behind the last layer, and its result
            goes through an MLP, as in SigLIP. transformers runs this although nothing reads it.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    channels: int = 3
    prefix_tokens: int = 1
    pooling: bool = False

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Tokens that pass through the tower for one image."""
        return self.patches + self.prefix_tokens

    @classmethod
    def from_config(cls, config: object) -> TowerShape:
        """Read the sizes from the tower's config (`vision_config` of a vision-language model).

        Args:
            config: A transformers `CLIPVisionConfig` or `SiglipVisionConfig`.

        Raises:
            UnsupportedModelError: The config is of another type, or a size is missing from it.
        """
        model_type = _model_type(config, "vision tower", tuple(_TOWERS))
        return cls(
            hidden=_size(config, "hidden_size"),
            intermediate=_size(config, "intermediate_size"),
            layers=_size(config, "num_hidden_layers"),
            heads=_size(config, "num_attention_heads"),
            image_size=_size(config, "image_size"),
            patch_size=_size(config, "patch_size"),
            channels=_size(config, "num_channels"),
            prefix_tokens=_TOWERS[model_type],
            pooling=bool(getattr(config, "vision_use_head", False)),
        )


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a LLaVA-1.5-like model: vision tower, projector of two matrices, decoder.

    Attributes:
        decoder: The language model.
        tower: The vision tower.
        feature_layers: Tower layers whose features are concatenated before the projector.
        visual_tokens: Visual tokens of one image, or of one tile of it, as they come out of the
            projector.
    """

    decoder: DecoderShape
    tower: TowerShape
    feature_layers: int
    visual_tokens: int

    @classmethod
    def from_config(cls, config: object) -> ModelShape:
        """Read the sizes from a whole model's config.

        Args:
            config: A transformers `LlavaConfig`, e.g. `model.config`.

        Raises:
            UnsupportedModelError: The config, its decoder or its tower is of a type not known
                here, or a size is missing from it.
        """
        _model_type(config, "model", _FAMILIES)
        tower = TowerShape.from_config(_part(config, "vision_config"))
        layer: Any = _part(config, "vision_feature_layer")
        strategy = _part(config, "vision_feature_select_strategy")
        return cls(
            decoder=DecoderShape.from_config(_part(config, "text_config")),
            tower=tower,
            feature_layers=1 if isinstance(layer, int) else len(layer),
            visual_tokens=tower.patches if strategy == "default" else tower.tokens,
        )


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
    return ModelShape(decoder, tower, feature_layers=1, visual_tokens=tower.patches)


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
