"""Sizes of vision-language models, without the models: for FLOPs, and for random-weight stand-ins.

A shape is read from a transformers config (`ModelShape.from_config`) or looked up by name
(`model_shape("llava-1.5-7b")`), and a name can be turned back into a full config
(`llava_config`), from which a model with random weights can be built to measure speed without a
checkpoint. transformers is imported only by `llava_config`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pore.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import LlavaConfig

# Decoders by `model_type` whose layers are all alike: an attention and a gated MLP.
_DECODERS = (
    "llama",
    "mistral",
    "ministral3",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "cohere2",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "glm4v_text",
    "glm_ocr_text",
)
# Those whose layers differ, or that are more than that: experts, recurrences, compressed keys.
_MIXED = (
    "qwen3_vl_moe_text",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "glm4v_moe_text",
    "mistral4",
    "llama4_text",
)
# Towers of a fixed size by `model_type`: tokens beside the patches (a CLS token).
_TOWERS: Mapping[str, int] = MappingProxyType(
    {
        "clip_vision_model": 1,
        "siglip_vision_model": 0,
        "internvl_vision": 1,
        "llama4_vision_model": 1,
        "idefics3_vision": 0,
        "smolvlm_vision": 0,
    }
)
# Towers for images of any size: whether the MLP is gated (three matrices instead of two).
_ANY_SIZE: Mapping[str, bool] = MappingProxyType(
    {
        "pixtral": True,
        "qwen2_vl_vision": False,
        "qwen2_5_vl_vision": True,
        "qwen3_vl_vision": False,
        "qwen3_vl_moe_vision": False,
        "qwen3_5_vision": False,
        "qwen3_5_moe_vision": False,
        "glm4v_vision": True,
        "glm4v_moe_vision": True,
        "glm_ocr_vision": True,
    }
)
_TILES = "images are cut into tiles, as many as their size asks for"
_SIZES = "images have as many tokens as their size asks for"


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
class LayerShape:
    """What one decoder layer multiplies, by the token and by the pair of tokens.

    Attributes:
        token: Multiply-adds of every token: with all matrices that it meets, those of its experts
            alone where there are some, and with the state of a recurrence.
        pair: Multiply-adds of every pair of tokens: of queries with keys, and with values; 0 in a
            layer without attention.
        ahead: Those of `token` up to queries, keys and values.
    """

    token: int
    pair: int
    ahead: int


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder (the language model), as its FLOPs need them.

    Attributes:
        hidden: Width of the residual stream, d.
        intermediate: Width of the MLP, m; of all experts that a token meets together.
        layers: Number of decoder layers.
        heads: Query heads of a layer.
        kv_heads: Key and value heads of a layer; fewer than `heads` with grouped queries.
        head_dim: Width of one head; `heads * head_dim` need not be `hidden`.
        vocab: Rows of the output head.
        gated: Whether the MLP has three matrices (gate, up, down) rather than two.
        each: Every layer, where they are not all alike or are more than attention and MLP; empty
            where the sizes above say all.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: bool
    each: tuple[LayerShape, ...] = ()

    def layer(self, number: int) -> LayerShape:
        """What a layer multiplies; sliding windows are counted as if they showed everything."""
        if self.each:
            return self.each[number]
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        ahead = self.hidden * (queries + 2 * keys)
        mlp = self.hidden * self.intermediate * (3 if self.gated else 2)
        return LayerShape(ahead + queries * self.hidden + mlp, 2 * queries, ahead)

    @classmethod
    def from_config(cls, config: object) -> DecoderShape:
        """Read the sizes from the decoder's config (`text_config` of a vision-language model).

        Args:
            config: A transformers config, such as of type llama or qwen3_vl_moe_text.

        Raises:
            UnsupportedModelError: The config is of a type not known here, or a size is missing from
                it.
        """
        model_type = _model_type(config, "decoder", (*_DECODERS, *_MIXED))
        hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
        head_dim = _size(config, "head_dim", default=hidden // heads)
        if model_type == "mistral4":
            head_dim = _size(config, "qk_nope_head_dim") + _size(config, "qk_rope_head_dim")
        mlps = _mlps(config, model_type)
        shape = cls(
            hidden=hidden,
            intermediate=mlps[-1][0],
            layers=_size(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=_size(config, "num_key_value_heads", default=heads),
            head_dim=head_dim,
            vocab=_size(config, "vocab_size"),
            gated=True,
        )
        if model_type in _DECODERS:
            return shape
        return replace(shape, each=tuple(_layers(config, model_type, shape, mlps)))


def _mlps(config: Any, model_type: str) -> list[tuple[int, int]]:
    """Of every layer the width of all MLPs that a token meets, and what decides on them.

    A router has a row for every expert; a shared expert may have a gate of one.
    """
    layers = _size(config, "num_hidden_layers")
    if model_type in ("qwen3_vl_moe_text", "qwen3_5_moe_text"):
        experts = _size(config, "num_experts")
        width = _size(config, "num_experts_per_tok") * _size(config, "moe_intermediate_size")
        if model_type == "qwen3_5_moe_text":
            width += _size(config, "shared_expert_intermediate_size")
            return [(width, experts + 1)] * layers
        step, dense = config.decoder_sparse_step, config.mlp_only_layers
        plain = _size(config, "intermediate_size"), 0
        return [plain if i in dense or (i + 1) % step else (width, experts) for i in range(layers)]
    if model_type in ("glm4v_moe_text", "mistral4"):
        each = _size(config, "moe_intermediate_size")
        chosen = _size(config, "num_experts_per_tok") + _size(config, "n_shared_experts")
        plain = _size(config, "intermediate_size"), 0
        dense = config.first_k_dense_replace
        mixed = chosen * each, _size(config, "n_routed_experts")
        return [plain if i < dense else mixed for i in range(layers)]
    if model_type == "llama4_text":
        # Stock transformers sends every token through all experts, and the shared one.
        experts = _size(config, "num_local_experts")
        plain = _size(config, "intermediate_size_mlp"), 0
        mixed = (experts + 1) * _size(config, "intermediate_size"), experts
        return [mixed if i in config.moe_layers else plain for i in range(layers)]
    return [(_size(config, "intermediate_size"), 0)] * layers


def _layers(
    config: Any, model_type: str, shape: DecoderShape, mlps: list[tuple[int, int]]
) -> Iterator[LayerShape]:
    """Every layer of a decoder of `_MIXED`."""
    hidden, heads = shape.hidden, shape.heads
    queries, keys = heads * shape.head_dim, shape.kv_heads * shape.head_dim
    ahead, values = hidden * (queries + 2 * keys), queries
    if model_type == "mistral4":  # keys and values out of one compressed vector
        values = heads * _size(config, "v_head_dim")
        rank, rope = _size(config, "kv_lora_rank"), _size(config, "qk_rope_head_dim")
        squeezed = config.q_lora_rank
        asked = hidden * queries if squeezed is None else squeezed * (hidden + queries)
        unpacked = queries - heads * rope + values
        ahead = asked + hidden * (rank + rope) + rank * unpacked
    if model_type.startswith("qwen3_5"):  # queries come with a gate
        ahead += hidden * queries
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * shape.layers
    for kind, (width, routed) in zip(kinds, mlps, strict=True):
        mlp = hidden * (3 * width + routed)
        if kind == "linear_attention":
            yield LayerShape(_recurrent(config, hidden) + mlp, 0, 0)
        else:
            yield LayerShape(ahead + values * hidden + mlp, queries + values, ahead)


def _recurrent(config: Any, hidden: int) -> int:
    """Multiply-adds of a token in a gated DeltaNet: matrices, convolution and state.

    The state is read for the old value, written to, and read for the answer, as it is defined.
    Kernels do that in chunks of tokens, by other products, and more of them.
    """
    key_heads, heads = (_size(config, f"linear_num_{x}_heads") for x in ("key", "value"))
    key, value = (_size(config, f"linear_{x}_head_dim") for x in ("key", "value"))
    mixed = 2 * key_heads * key + heads * value
    projected = hidden * (mixed + heads * value + 2 * heads) + heads * value * hidden
    convolved = mixed * _size(config, "linear_conv_kernel_dim")
    return projected + convolved + 3 * heads * key * value


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a vision tower: a transformer over square patches.

    Attributes:
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        layers: Number of layers. transformers runs all of them, also those above the layer whose
            features are used.
        heads: Attention heads of a layer.
        image_size: Side of the square image, in pixels; None where images come in any size.
        patch_size: Side of a patch, in pixels.
        channels: Colour channels.
        prefix_tokens: Tokens beside the patches: 1 for a CLS token.
        pooling: Whether a query is attended to all patches behind the last layer, and its result
            goes through an MLP, as in SigLIP. transformers runs this although nothing reads it.
        gated: Whether the MLP has three matrices rather than two.
        frames: Frames of a video in one patch; an image is repeated to as many.
        window: Side in patches of the windows that layers attend in; None where there are none.
        full: The layers that attend to the whole image all the same.
        together: Whether all images of a prompt are one sequence, masked rather than parted.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    image_size: int | None
    patch_size: int
    channels: int = 3
    prefix_tokens: int = 1
    pooling: bool = False
    gated: bool = False
    frames: int = 1
    window: int | None = None
    full: tuple[int, ...] = ()
    together: bool = False

    @property
    def side(self) -> int:
        """Patches along a side of an image, which must have a size of its own."""
        assert self.image_size is not None
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of one image, which must have a size of its own."""
        return self.side**2

    @property
    def tokens(self) -> int:
        """Tokens that pass through the tower for one image."""
        return self.patches + self.prefix_tokens

    @classmethod
    def from_config(cls, config: object) -> TowerShape:
        """Read the sizes from the tower's config (`vision_config` of a vision-language model).

        Args:
            config: A transformers config, such as `CLIPVisionConfig`.

        Raises:
            UnsupportedModelError: The config is of a type not known here, or a size is missing from
                it.
        """
        model_type = _model_type(config, "vision tower", (*_TOWERS, *_ANY_SIZE))
        if model_type in _ANY_SIZE:
            return _any_size(cls, config, model_type)
        return cls(
            hidden=_size(config, "hidden_size"),
            intermediate=_size(config, "intermediate_size"),
            layers=_size(config, "num_hidden_layers"),
            heads=_size(config, "num_attention_heads"),
            image_size=_side(config, "image_size"),
            patch_size=_side(config, "patch_size"),
            channels=_size(config, "num_channels"),
            prefix_tokens=_TOWERS[model_type],
            pooling=model_type == "siglip_vision_model"
            and bool(getattr(config, "vision_use_head", True)),
        )


def _side(config: Any, name: str) -> int:
    """One side of a square, which the config may give as both."""
    value = getattr(config, name, None)
    if isinstance(value, list | tuple) and len(set(value)) == 1 and isinstance(value[0], int):
        return value[0]
    return _size(config, name)


def _any_size(cls: type[TowerShape], config: Any, model_type: str) -> TowerShape:
    """A tower of `_ANY_SIZE`."""
    if model_type == "pixtral":
        return cls(
            hidden=_size(config, "hidden_size"),
            intermediate=_size(config, "intermediate_size"),
            layers=_size(config, "num_hidden_layers"),
            heads=_size(config, "num_attention_heads"),
            image_size=None,
            patch_size=_size(config, "patch_size"),
            channels=_size(config, "num_channels"),
            prefix_tokens=0,
            gated=True,
            together=True,
        )
    second = model_type == "qwen2_vl_vision"  # which calls its sizes otherwise
    hidden = _size(config, "embed_dim" if second else "hidden_size")
    if second:
        intermediate = int(hidden * config.mlp_ratio)
    else:
        narrow = model_type in ("glm4v_vision", "glm4v_moe_vision")
        intermediate = _size(config, "out_hidden_size" if narrow else "intermediate_size")
    windowed = model_type == "qwen2_5_vl_vision"
    patch, merge = _size(config, "patch_size"), _size(config, "spatial_merge_size")
    return cls(
        hidden=hidden,
        intermediate=intermediate,
        layers=_size(config, "depth"),
        heads=_size(config, "num_heads"),
        image_size=None,
        patch_size=patch,
        channels=_size(config, "in_channels"),
        prefix_tokens=0,
        gated=_ANY_SIZE[model_type],
        frames=_size(config, "temporal_patch_size"),
        window=_size(config, "window_size") // merge // patch * merge if windowed else None,
        full=tuple(config.fullatt_block_indexes) if windowed else (),
    )


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a vision-language model: vision tower, projector, decoder.

    Attributes:
        decoder: The language model.
        tower: The vision tower; None where it is of a type not known here.
        projector: Multiply-adds of a visual token in what takes the tower's patches to the decoder;
            None where it is not known here.
        visual_tokens: Visual tokens of one image, or of one tile of it, as they come out of the
            projector; None where images come in any size.
        merge: Patches along a side of what becomes one visual token.
        stacked: Multiply-adds of a visual token in what takes patches of lower tower layers there
            too (DeepStack), which is done before any are chosen in the tower.
        frame_tokens: Tokens of a video's frame that the projector makes, where they are not as many
            as of an image.
        varies: Why images have no one number of visual tokens; None where they have.
    """

    decoder: DecoderShape
    tower: TowerShape | None
    projector: int | None
    visual_tokens: int | None
    merge: int = 1
    stacked: int = 0
    frame_tokens: int | None = None
    varies: str | None = None

    @property
    def image_tokens(self) -> int:
        """Visual tokens of every image.

        Raises:
            UnsupportedModelError: Images have no one number of them.
        """
        if self.varies is not None or self.visual_tokens is None:
            raise UnsupportedModelError(
                "This needs one number of visual tokens that all images have, but in this model "
                f"{self.varies}."
            )
        return self.visual_tokens

    @property
    def tower_layers(self) -> int:
        """Layers of the vision tower.

        Raises:
            UnsupportedModelError: The tower is of a type not known here.
        """
        if self.tower is None:
            raise UnsupportedModelError("The sizes of this model's vision tower are not known.")
        return self.tower.layers

    @classmethod
    def from_config(cls, config: object) -> ModelShape:
        """Read the sizes from a whole model's config.

        Args:
            config: A transformers config, e.g. `model.config`. Of a model that is not known here
                the decoder alone is read.

        Raises:
            UnsupportedModelError: The decoder is of a type not known here, or a size is missing
                from the config.
        """
        decoder = DecoderShape.from_config(_part(config, "text_config"))
        model_type = getattr(config, "model_type", None)
        read = _MODELS.get(str(model_type))
        if read is None:
            varies = f"they are not known (model_type {model_type!r})"
            return cls(decoder, None, None, None, varies=varies)
        return read(config, decoder, TowerShape.from_config(_part(config, "vision_config")))


def _llava_like(config: Any, decoder: DecoderShape, tower: TowerShape) -> ModelShape:
    """LLaVA: two matrices, on the features of one tower layer or several."""
    layer: Any = _part(config, "vision_feature_layer")
    wide = tower.hidden * (1 if isinstance(layer, int) else len(layer))
    projector = decoder.hidden * (wide + decoder.hidden)
    if tower.image_size is None:
        return ModelShape(decoder, tower, projector, None, varies=_SIZES)
    strategy = _part(config, "vision_feature_select_strategy")
    tokens = tower.patches if strategy == "default" else tower.tokens
    varies = None if config.model_type in ("llava", "video_llava") else _TILES
    frame = None
    if config.model_type == "llava_next_video":
        frame = (tower.side // _size(config, "spatial_pool_stride")) ** 2
    elif config.model_type == "video_llava":
        frame = tower.tokens
    return ModelShape(decoder, tower, projector, tokens, frame_tokens=frame, varies=varies)


def _merged(config: Any, decoder: DecoderShape, tower: TowerShape) -> ModelShape:
    """Qwen-VL: two matrices on squares of patches; those of DeepStack besides."""
    vision: Any = config.vision_config
    merge = _size(vision, "spatial_merge_size")
    wide = tower.hidden * merge**2
    out = _size(vision, "hidden_size" if config.model_type == "qwen2_vl" else "out_hidden_size")
    projector = wide * (wide + out)
    stacked = projector * len(getattr(vision, "deepstack_visual_indexes", None) or ())
    return ModelShape(decoder, tower, projector, None, merge, stacked, varies=_SIZES)


def _glm(config: Any, decoder: DecoderShape, tower: TowerShape) -> ModelShape:
    """GLM-4V: squares of patches convolved, a matrix and a gated MLP."""
    vision: Any = config.vision_config
    merge, out = _size(vision, "spatial_merge_size"), _size(vision, "out_hidden_size")
    if vision.model_type == "glm_ocr_vision":
        wide = out * tower.channels
    else:
        wide = _size(vision, "intermediate_size")
    projector = out * (tower.hidden * merge**2 + out + 3 * wide)
    return ModelShape(decoder, tower, projector, None, merge, varies=_SIZES)


def _pixtral_merged(config: Any, decoder: DecoderShape, tower: TowerShape) -> ModelShape:
    """Mistral 3: squares of patches to one, then as LLaVA."""
    merge = _size(config, "spatial_merge_size")
    layer = getattr(config, "vision_feature_layer", -1)
    wide = tower.hidden * (1 if isinstance(layer, int) else len(layer))
    projector = tower.hidden**2 * merge**2 + decoder.hidden * (wide + decoder.hidden)
    return ModelShape(decoder, tower, projector, None, merge, varies=_SIZES)


def _tiled(merge: int, projector: int, decoder: DecoderShape, tower: TowerShape) -> ModelShape:
    tokens = (tower.side // merge) ** 2
    return ModelShape(decoder, tower, projector, tokens, merge, varies=_TILES)


def _internvl(config: Any, decoder: DecoderShape, tower: TowerShape) -> ModelShape:
    """InternVL: two matrices on squares of patches."""
    merge, out = round(1 / config.downsample_ratio), decoder.hidden
    return _tiled(merge, out * (tower.hidden * merge**2 + out), decoder, tower)


def _llama4(config: Any, decoder: DecoderShape, tower: TowerShape) -> ModelShape:
    """Llama 4: two matrices on squares of patches, then one."""
    vision: Any = config.vision_config
    wide, out = (_size(vision, f"projector_{x}_dim") for x in ("input", "output"))
    merge = round(1 / vision.pixel_shuffle_ratio)
    last = _size(vision, "vision_output_dim") * decoder.hidden
    return _tiled(merge, tower.intermediate * wide + out**2 + last, decoder, tower)


def _idefics3(config: Any, decoder: DecoderShape, tower: TowerShape) -> ModelShape:
    """Idefics3: one matrix on squares of patches."""
    merge = _size(config, "scale_factor")
    return _tiled(merge, tower.hidden * merge**2 * decoder.hidden, decoder, tower)


def _cohere(config: Any, decoder: DecoderShape, tower: TowerShape) -> ModelShape:
    """Aya Vision: two matrices on squares of patches, half of what the first makes a gate."""
    merge = _size(config, "downsample_factor")
    wide = _size(config, "alignment_intermediate_size", default=decoder.hidden)
    projector = tower.hidden * merge**2 * wide + wide // 2 * decoder.hidden
    return _tiled(merge, projector, decoder, tower)


def _gemma3(config: Any, decoder: DecoderShape, tower: TowerShape) -> ModelShape:
    """Gemma 3: one matrix on means of squares of patches."""
    tokens = _size(config, "mm_tokens_per_image")
    merge = tower.side // round(tokens**0.5)
    return ModelShape(decoder, tower, tower.hidden * decoder.hidden, tokens, merge)


def _paligemma(config: Any, decoder: DecoderShape, tower: TowerShape) -> ModelShape:
    """PaliGemma: one matrix."""
    projector = tower.hidden * decoder.hidden
    return ModelShape(decoder, tower, projector, tower.patches)


_MODELS: Mapping[str, Callable[[Any, DecoderShape, TowerShape], ModelShape]] = MappingProxyType(
    {
        **dict.fromkeys(("llava", "video_llava"), _llava_like),
        **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), _llava_like),
        **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _merged),
        **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), _merged),
        **dict.fromkeys(("glm4v", "glm46v", "glm4v_moe", "glm_ocr"), _glm),
        **dict.fromkeys(("mistral3", "lighton_ocr"), _pixtral_merged),
        "internvl": _internvl,
        "llama4": _llama4,
        **dict.fromkeys(("idefics3", "smolvlm"), _idefics3),
        **dict.fromkeys(("aya_vision", "cohere2_vision"), _cohere),
        "gemma3": _gemma3,
        "paligemma": _paligemma,
    }
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
