"""Qwen2.5-VL in vLLM, pruned: the tokens that are left keep their positions on three axes.

vLLM asks for positions twice. When a prompt comes, those of text follow from the sizes of its
images alone; every token of an image gets the position at which the image starts. When an image has
been encoded, it is known which tokens are left: their rows carry their places in the image as three
more columns, by which the positions are corrected. vLLM has this second step for videos (EVS).

Importing this module needs vLLM, which alone imports it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import PromptReplacement

from pore.engine.embeddings import KeptEmbeddings
from pore.engine.pruner import Pruner
from pore.errors import InputError, UnsupportedModelError
from pore.serving.vllm.positions import prompt_positions, with_places
from pore.serving.vllm.settings import pruner_of
from pore.serving.vllm.tower import PrunedTower

_log = init_logger("vllm.pore")

_PROTOCOL_ON = 0.5
"""vLLM corrects positions after encoding only if a share of videos is to be pruned. There are no
videos here, so that the number is of no consequence."""


class PrunedInfo(Qwen2_5_VLProcessingInfo):  # type: ignore[misc]
    """How many tokens are left of an image, for placeholders, profiling and budgets of caches."""

    @cached_property
    def pruner(self) -> Pruner:
        """The method, see `pruner_of`."""
        return pruner_of(self.get_hf_config())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Images alone: how many tokens are left of a video is not known from its size."""
        return {"image": None}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Tokens that are left of the largest image."""
        return {"image": self.get_max_image_tokens()}

    def get_num_image_tokens(self, **size: Any) -> int:
        """Tokens that are left of an image."""
        return self.pruner.counts(super().get_num_image_tokens(**size), 1)[-1]


class PrunedProcessor(Qwen2_5_VLMultiModalProcessor):  # type: ignore[misc]
    """Gives an image as many placeholders as tokens are left of it."""

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        if "image" in mm_items and not isinstance(mm_items["image"], ImageProcessorItems):
            raise InputError("A server that prunes images takes no embeddings in their place.")
        merge = self.info.get_image_processor(**hf_processor_mm_kwargs).merge_size ** 2
        token = self.info.get_hf_config().image_token_id

        def left(item: int) -> list[int]:
            grid = out_mm_kwargs["image"][item]["image_grid_thw"].data
            return [token] * self.info.pruner.counts(int(grid.prod()) // merge, 1)[-1]

        return [PromptReplacement(modality="image", target=[token], replacement=left)]


@MULTIMODAL_REGISTRY.register_processor(
    PrunedProcessor, info=PrunedInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class PoreQwen25VL(Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """vLLM's Qwen2.5-VL, with the tower of transformers, in which a method of pore chooses."""

    supports_encoder_cudagraph = False
    supports_encoder_tp_data = False
    supports_mm_device_do_normalize = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        pruner = pruner_of(config)
        vllm_config.model_config.multimodal_config.video_pruning_rate = _PROTOCOL_ON
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        tower = PrunedTower(config, pruner, ["visual"])
        self._rows = tower.rows  # not the tower: its outline of a decoder is no part of this model
        self._pruner = pruner
        self.visual = tower.modules["visual"]
        _log.info("pore prunes every image: %r", pruner)

    def embed_multimodal(self, **kwargs: Any) -> tuple[Tensor, ...]:
        """(k, D + 3) of every image: what is left of it, and its places."""
        pixels, grids = kwargs.get("pixel_values"), kwargs.get("image_grid_thw")
        if pixels is None or grids is None:
            return ()
        merge = self.config.vision_config.spatial_merge_size**2
        found: list[Tensor] = []
        for part, grid in zip(pixels.split(grids.prod(-1).tolist()), grids, strict=True):
            inputs = {"pixel_values": part, "image_grid_thw": grid[None]}
            (image,) = self._rows(int(grid.prod()) // merge, inputs)
            found.append(_with_places(image))
        return tuple(found)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Sequence[Any]
    ) -> tuple[Tensor, int]:
        """(3, N) positions of a prompt whose images are not encoded yet, and the next less N."""
        merge = self.config.vision_config.spatial_merge_size
        images = []
        for feature in sorted(mm_features, key=lambda f: f.mm_position.offset):
            _, height, width = feature.data["image_grid_thw"].data.tolist()
            where = feature.mm_position
            images.append((where.offset, where.length, max(height, width) // merge))
        return prompt_positions(len(input_tokens), images)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """The embeddings without their places, the positions with them, and the next less N."""
        places = [rows[:, -3:].T.round().long() for rows in multimodal_embeddings]
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        visual = ids == self.config.image_token_id
        positions = with_places(mrope_positions, visual, places, num_computed_tokens)
        delta = int(positions.max()) + 1 - len(ids)
        return [rows[:, :-3] for rows in multimodal_embeddings], positions, delta

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights of the checkpoint."""
        loaded: set[str] = super().load_weights(weights)
        self._try_out()
        return loaded

    def _try_out(self) -> None:
        """Prune one picture, so that what cannot be done fails before the first request."""
        vision, keep = self.config.vision_config, getattr(self._pruner, "keep", 1)
        side = math.isqrt(keep if isinstance(keep, int) else 0) + 4  # in visual tokens
        side *= vision.spatial_merge_size
        values = 3 * vision.temporal_patch_size * vision.patch_size**2
        weight = next(self.visual.parameters())
        pixels = torch.linspace(-1, 1, side**2 * values).reshape(side**2, values).to(weight)
        self.embed_multimodal(
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, side, side]], device=weight.device),
        )


def _with_places(image: KeptEmbeddings) -> Tensor:
    """(k, D + 3) what is left of an image, with frame, row and column."""
    if image.grid is None or min(image.kept) < 0:
        raise UnsupportedModelError(
            "The method leaves tokens that stand for no place in the image, and this model gives "
            "every token one; use a method that only drops tokens."
        )
    rows = image.embeddings
    kept = torch.tensor(image.kept, device=rows.device)
    width = image.grid[1]
    places = torch.stack([torch.zeros_like(kept), kept // width, kept % width], 1)
    return torch.cat([rows, places.to(rows.dtype)], 1)
