"""Shapes of vision towers: what their FLOPs depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pore.cost.reading import known_type, part, side, size

# Towers for images of one size by `model_type`: number of tokens beside the patches (a CLS token).
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


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a vision tower: a transformer over square patches.

    Attributes:
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        layers: Number of layers. transformers runs all of them, also those above the layer whose
            features are used.
        heads: Attention heads of a layer.
        image_size: Side of the square image, in pixels; None if images come in any size.
        patch_size: Side of a patch, in pixels.
        channels: Colour channels.
        prefix_tokens: Tokens beside the patches: 1 for a CLS token.
        pooling: Whether, after the last layer, one learned query attends to all patches and its
            result goes through an MLP, as in SigLIP. transformers runs it although nothing reads
            it.
        gated: Whether the MLP has three matrices rather than two.
        frames: Frames of a video in one patch; an image is repeated that many times.
        window: Side in patches of the windows in which layers attend; None if there are none.
        full: The layers that attend to the whole image, if others attend in windows.
        together: Whether all images of a prompt are computed as one sequence under a mask, so that
            attention between images costs as much as within them.
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
        """Number of patches along a side of an image, in a tower with one image size."""
        assert self.image_size is not None
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Number of patches of one image, in a tower with one image size."""
        return self.side**2

    @property
    def tokens(self) -> int:
        """Number of tokens that pass through the tower for one image."""
        return self.patches + self.prefix_tokens

    @classmethod
    def from_config(cls, config: object) -> TowerShape:
        """Read the sizes from the tower's config (`vision_config` of a vision-language model).

        Args:
            config: A transformers config, such as `CLIPVisionConfig`.

        Raises:
            UnsupportedModelError: The config has a type that is not known here, or lacks a size.
        """
        model_type = known_type(config, "vision tower", (*_TOWERS, *_ANY_SIZE))
        if model_type in _ANY_SIZE:
            return _any_size(cls, config, model_type)
        return cls(
            hidden=size(config, "hidden_size"),
            intermediate=size(config, "intermediate_size"),
            layers=size(config, "num_hidden_layers"),
            heads=size(config, "num_attention_heads"),
            image_size=side(config, "image_size"),
            patch_size=side(config, "patch_size"),
            channels=size(config, "num_channels"),
            prefix_tokens=_TOWERS[model_type],
            pooling=model_type == "siglip_vision_model"
            and bool(getattr(config, "vision_use_head", True)),
        )


def tower_of(config: object) -> TowerShape:
    """The sizes of the vision tower of a whole model's config.

    Raises:
        UnsupportedModelError: As in `TowerShape.from_config`, or there is no `vision_config`.
    """
    return TowerShape.from_config(part(config, "vision_config"))


def _any_size(cls: type[TowerShape], config: Any, model_type: str) -> TowerShape:
    """A tower of `_ANY_SIZE`."""
    if model_type == "pixtral":
        return cls(
            hidden=size(config, "hidden_size"),
            intermediate=size(config, "intermediate_size"),
            layers=size(config, "num_hidden_layers"),
            heads=size(config, "num_attention_heads"),
            image_size=None,
            patch_size=size(config, "patch_size"),
            channels=size(config, "num_channels"),
            prefix_tokens=0,
            gated=True,
            together=True,
        )
    second = model_type == "qwen2_vl_vision"  # its sizes have other names
    hidden = size(config, "embed_dim" if second else "hidden_size")
    if second:
        intermediate = int(hidden * config.mlp_ratio)
    else:
        narrow = model_type in ("glm4v_vision", "glm4v_moe_vision")
        intermediate = size(config, "out_hidden_size" if narrow else "intermediate_size")
    windowed = model_type == "qwen2_5_vl_vision"
    patch, merge = size(config, "patch_size"), size(config, "spatial_merge_size")
    return cls(
        hidden=hidden,
        intermediate=intermediate,
        layers=size(config, "depth"),
        heads=size(config, "num_heads"),
        image_size=None,
        patch_size=patch,
        channels=size(config, "in_channels"),
        prefix_tokens=0,
        gated=_ANY_SIZE[model_type],
        frames=size(config, "temporal_patch_size"),
        window=size(config, "window_size") // merge // patch * merge if windowed else None,
        full=tuple(config.fullatt_block_indexes) if windowed else (),
    )
