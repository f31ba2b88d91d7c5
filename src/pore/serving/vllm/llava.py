"""LLaVA-1.5 in vLLM, pruned: a prompt has as many placeholders as tokens are left of an image.

Importing this module needs vLLM, which alone imports it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

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
from vllm.multimodal import MULTIMODAL_REGISTRY

from pore.engine.pruner import Pruner
from pore.serving.vllm.settings import pruner_of
from pore.serving.vllm.tower import PrunedTower, renamed

_log = init_logger("vllm.pore")

_MODULES = ("vision_tower", "multi_modal_projector")


class PrunedInfo(LlavaProcessingInfo):  # type: ignore[misc]
    """How many tokens are left of an image, for placeholders, profiling and budgets of caches."""

    @cached_property
    def pruner(self) -> Pruner:
        """The method, see `pruner_of`."""
        return pruner_of(self.get_hf_config())

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Tokens that are left of an image."""
        whole = super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        return self.pruner.counts(whole, 1)[-1]


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=PrunedInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PoreLlava(LlavaForConditionalGeneration):  # type: ignore[misc]
    """vLLM's LLaVA, with the tower of transformers, in which a method of pore chooses."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        pruner = pruner_of(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        tower = PrunedTower(config, pruner, _MODULES)
        self._rows = tower.rows  # not the tower: its outline of a decoder is no part of this model
        for name, module in tower.modules.items():
            setattr(self, name, module)
        _log.info("pore prunes every image: %r", pruner)

    def _process_image_input(self, image_input: Any) -> Any:
        if not isinstance(image_input, LlavaImagePixelInputs):
            return super()._process_image_input(image_input)
        pixels: Tensor = image_input["pixel_values"]
        return self._pruned(pixels)

    def _pruned(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """(k, D) of what is left of every picture."""
        vision = self.config.vision_config
        whole = (vision.image_size // vision.patch_size) ** 2
        return tuple(one.embeddings for one in self._rows(whole, {"pixel_values": pixels}))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights, those of the tower under the names that transformers has for them."""
        nested = hasattr(self.vision_tower, "vision_model")
        names = {} if nested else {"vision_tower.vision_model.": "vision_tower."}
        loaded: set[str] = super().load_weights(renamed(weights, names))
        self._try_out()
        return loaded

    def _try_out(self) -> None:
        """Prune one picture, so that what cannot be done fails before the first request."""
        side = self.config.vision_config.image_size
        weight = next(self.vision_tower.parameters())
        pixels = torch.linspace(-1, 1, 3 * side**2).reshape(1, 3, side, side).to(weight)
        self._pruned(pixels)
