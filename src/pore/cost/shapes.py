"""Sizes of vision-language models, without the models: for FLOPs, and for random-weight stand-ins.

A shape is read from a transformers config (`ModelShape.from_config`) or looked up by name
(`model_shape("llava-1.5-7b")`), and a name can be turned back into a full config
(`llava_config`), from which a model with random weights can be built to measure speed without a
checkpoint. transformers is imported only by `llava_config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pore.cost.decoders import DecoderShape, _part, _size
from pore.cost.towers import TowerShape
from pore.errors import UnsupportedModelError

_TILES = "images are cut into tiles, as many as their size asks for"


_SIZES = "images have as many tokens as their size asks for"


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
