"""LLaVA-1.5 and LLaVA-NeXT in vLLM, pruned: as many placeholders as tokens are left of an image.

Importing this module needs vLLM, which alone imports it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaImagePixelInputs,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextImagePixelInputs,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize

from pore.serving.vllm.indices import KeysChecked
from pore.serving.vllm.reporting import report
from pore.serving.vllm.settings import pruner_of
from pore.serving.vllm.tiles import TiledCounts
from pore.serving.vllm.tower import PrunedTower, renamed

_log = init_logger("vllm.pore")

_MODULES = ("vision_tower", "multi_modal_projector")
_TILED = (*_MODULES, "image_newline")


class _Model:
    """A model of vLLM, with the tower of transformers, in which a method of pore chooses."""

    config: Any
    vision_tower: Any
    parts: ClassVar[tuple[str, ...]] = _MODULES

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        pruner = pruner_of(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._method = pruner
        tower = PrunedTower(config, pruner, self.parts)
        self._rows = tower.rows  # not the tower: its outline of a decoder is no part of this model
        for name, module in tower.modules.items():
            setattr(self, name, module)
        _log.info("pore prunes every image: %r", pruner)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights, those of the tower under the names that transformers has for them."""
        nested = hasattr(self.vision_tower, "vision_model")
        names = {} if nested else {"vision_tower.vision_model.": "vision_tower."}
        loaded: set[str] = super().load_weights(renamed(weights, names))  # type: ignore[misc]
        self._try_out()
        return loaded

    def _try_out(self) -> None:
        """Prune one picture, so that what cannot be done fails before the first request."""
        raise NotImplementedError

    def _noise(self, *tiles: int) -> Tensor:
        """(..., 3, H, W) pixels of a picture that has no two equal patches."""
        side = self.config.vision_config.image_size
        weight = next(self.vision_tower.parameters())
        shape = (*tiles, 3, side, side)
        return torch.linspace(-1, 1, math.prod(shape)).reshape(shape).to(weight)


class PrunedInfo(LlavaProcessingInfo):  # type: ignore[misc]
    """How many tokens are left of an image, for placeholders, profiling and budgets of caches."""

    by_request = False

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        self.pruner = pruner_of(self.get_hf_config())
        report(ctx.model_config.served_model_name, self.pruner)

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Tokens that are left of an image."""
        whole = super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        return self.pruner.counts(whole, 1)[-1]


class _Processor(KeysChecked, LlavaMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(
    _Processor, info=PrunedInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PoreLlava(_Model, LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA-1.5, pruned."""

    def _process_image_input(self, image_input: Any) -> Any:
        if not isinstance(image_input, LlavaImagePixelInputs):
            return super()._process_image_input(image_input)
        return self._pruned(image_input["pixel_values"])

    def _pruned(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """(k, D) of what is left of every picture."""
        vision = self.config.vision_config
        whole = (vision.image_size // vision.patch_size) ** 2
        left = self._method.counts(whole, 1)[-1]
        return tuple(one.embeddings for one in self._rows(whole, left, {"pixel_values": pixels}))

    def _try_out(self) -> None:
        self._pruned(self._noise(1))


class PrunedTilesInfo(LlavaNextProcessingInfo):  # type: ignore[misc]
    """How many tokens are left of an image in tiles."""

    by_request = False

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        config = self.get_hf_config()
        pruner = pruner_of(config)
        self.counts = TiledCounts(config, pruner, _TILED)
        report(ctx.model_config.served_model_name, pruner)

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Tokens that are left of an image."""
        return self.counts.left(image_height, image_width)

    def get_image_size_with_most_features(self) -> ImageSize:
        """The size of which most go through the tower, whatever is left of them."""
        height, width = _largest(self.get_hf_config(), self.counts)
        return ImageSize(width=width, height=height)


class _TilesProcessor(KeysChecked, LlavaNextMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(
    _TilesProcessor, info=PrunedTilesInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PoreLlavaNext(_Model, LlavaNextForConditionalGeneration):  # type: ignore[misc]
    """LLaVA-NeXT, pruned."""

    parts = _TILED

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._counts = TiledCounts(self.config, self._method, self.parts)

    def _process_image_input(self, image_input: Any) -> Any:
        if not isinstance(image_input, LlavaNextImagePixelInputs):
            return super()._process_image_input(image_input)
        sizes = image_input["image_sizes"].tolist()
        pairs = zip(image_input["pixel_values"], sizes, strict=True)
        return [self._pruned(tiles, height, width) for tiles, (height, width) in pairs]

    def _pruned(self, tiles: Tensor, height: int, width: int) -> Tensor:
        """(k, D) of what is left of a picture of so many pixels."""
        whole = len(self._counts.tiling(height, width).slots)
        sizes = torch.tensor([[height, width]])
        inputs = {"pixel_values": tiles[None], "image_sizes": sizes}
        (image,) = self._rows(whole, self._counts.left(height, width), inputs)
        return image.embeddings

    def _try_out(self) -> None:
        size = _largest(self.config, self._counts)
        self._pruned(self._noise(self._counts.tiling(*size).tiles), *size)


def _largest(config: Any, counts: TiledCounts) -> tuple[int, int]:
    """(height, width) of the image with most tokens before any is dropped."""
    sizes = [(height, width) for height, width in config.image_grid_pinpoints]
    return max(sizes, key=lambda size: len(counts.tiling(*size).slots))
