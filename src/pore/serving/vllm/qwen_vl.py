"""Qwen2.5-VL and Qwen3-VL in vLLM, pruned: the tokens that are left keep their three positions.

vLLM asks for positions twice. When a prompt comes, those of text follow from the sizes of its
images alone; every token of an image gets the position at which the image starts. When an image has
been encoded, it is known which tokens are left: their rows carry their places in the image as a few
more columns, by which the positions are corrected. vLLM has this second step for videos (EVS).

In Qwen3-VL a row also carries what the first decoder layers add to the token (DeepStack), before
its place: vLLM's model takes it from there.

Importing this module needs vLLM, which alone imports it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
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
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import PromptReplacement

from pore.engine.pruner import Pruner
from pore.errors import BudgetError, InputError, UnsupportedModelError
from pore.serving.vllm.indices import KEY, KeysChecked, checked, kept_of
from pore.serving.vllm.positions import (
    COLUMNS,
    place_columns,
    places_of,
    prompt_positions,
    with_places,
)
from pore.serving.vllm.reporting import report
from pore.serving.vllm.settings import by_request, pruner_of, trial_side
from pore.serving.vllm.tower import PrunedTower

_log = init_logger("vllm.pore")

_PROTOCOL_ON = 0.5
"""vLLM corrects positions after encoding only if a share of videos is to be pruned. There are no
videos here, so that the number is of no consequence."""


class _Info:
    """How many tokens are left of an image, for placeholders, profiling and budgets of caches."""

    ctx: Any

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)  # type: ignore[call-arg]
        config = self.get_hf_config()  # type: ignore[attr-defined]
        self.by_request = by_request(config)
        self.pruner = None if self.by_request else pruner_of(config)
        report(ctx.model_config.served_model_name, self.pruner)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Images alone: how many tokens are left of a video is not known from its size."""
        return {"image": None}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Tokens that are left of the largest image."""
        return {"image": self.get_max_image_tokens()}  # type: ignore[attr-defined]

    def get_num_image_tokens(self, **size: Any) -> int:
        """Tokens that are left of an image, or may be."""
        whole = super().get_num_image_tokens(**size)  # type: ignore[misc]
        return _left(self.pruner, whole)


class _Processor(KeysChecked):
    """Gives an image as many placeholders as tokens are left of it.

    Where requests choose, what they keep goes to the model beside the pixels.
    """

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        given = inputs.hf_processor_mm_kwargs
        if not self.info.by_request or "image" not in inputs.mm_data_items:
            return super()._get_mm_hashes(inputs)  # type: ignore[no-any-return, misc]
        # An image with other indices is another one, also within a request.
        plain = replace(inputs, hf_processor_mm_kwargs={})
        hashes = dict(super()._get_mm_hashes(plain))  # type: ignore[misc]
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        pairs = zip(hashes["image"], checked(given.get(KEY), len(hashes["image"])), strict=True)
        hashes["image"] = [
            MultiModalHasher.hash_kwargs(algorithm, mm_hash=one, kept=json.dumps(entry))
            for one, entry in pairs
        ]
        return hashes

    def _get_cache_missing_processor_kwargs(
        self, inputs: Any, mm_is_cached: Mapping[str, list[bool]]
    ) -> Mapping[str, Any]:
        given = inputs.hf_processor_mm_kwargs
        if given.get(KEY) is None or "image" not in mm_is_cached:
            return given  # type: ignore[no-any-return]
        pairs = zip(given[KEY], mm_is_cached["image"], strict=True)
        return {**given, KEY: [entry for entry, cached in pairs if not cached]}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        others = {name: value for name, value in hf_kwargs.items() if name != KEY}
        data = super()._apply_hf_processor_main(mm_items, others)  # type: ignore[misc]
        if self.info.by_request and "image_grid_thw" in data:
            grids = data["image_grid_thw"].tolist()
            chosen = checked(hf_kwargs.get(KEY), len(grids))
            merge = self.info.get_hf_config().vision_config.spatial_merge_size
            data[KEY] = [
                torch.tensor(kept_of(entry, (height // merge, width // merge), number))
                for number, (entry, (_, height, width)) in enumerate(
                    zip(chosen, grids, strict=True)
                )
            ]
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> dict[str, Any]:
        fields = super()._get_mm_fields_config(hf_inputs, {})  # type: ignore[misc]
        return {**fields, KEY: MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        if "image" in mm_items and not isinstance(mm_items["image"], ImageProcessorItems):
            raise InputError("A server that prunes images takes no embeddings in their place.")
        config = self.info.get_hf_config()
        token, merge = config.image_token_id, config.vision_config.spatial_merge_size**2

        def left(item: int) -> list[int]:
            image = out_mm_kwargs["image"][item]
            if self.info.pruner is None:
                return [token] * len(image[KEY].data)
            return [token] * _left(
                self.info.pruner, int(image["image_grid_thw"].data.prod()) // merge
            )

        return [PromptReplacement(modality="image", target=[token], replacement=left)]


class _Model:
    """A model of vLLM, with the tower of transformers, in which a method of pore chooses.

    Where requests choose, with vLLM's own tower.
    """

    config: Any
    supports_encoder_cudagraph = False
    supports_encoder_tp_data = False
    supports_mm_device_do_normalize = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        pruner = None if by_request(config) else pruner_of(config)
        vllm_config.model_config.multimodal_config.video_pruning_rate = _PROTOCOL_ON
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._pruner = pruner
        if pruner is None:
            _log.info("pore keeps of every image what its request says")
            return
        tower = PrunedTower(config, pruner, ["visual"])
        self._rows = tower.rows  # not the tower: its outline of a decoder is no part of this model
        self.visual = tower.modules["visual"]
        _log.info("pore prunes every image: %r", pruner)

    def embed_multimodal(self, **kwargs: Any) -> tuple[Tensor, ...]:
        """(k, D + 4) of every image: what is left of it, and its places."""
        pixels, grids = kwargs.get("pixel_values"), kwargs.get("image_grid_thw")
        if pixels is None or grids is None:
            return ()
        merge = self.config.vision_config.spatial_merge_size
        widths = (grids[:, 2] // merge).tolist()
        if self._pruner is None:
            given = {"type": "pixel_values", "pixel_values": pixels, "image_grid_thw": grids}
            images = self._process_image_input(given)  # type: ignore[attr-defined]
            return tuple(
                _with_places(rows[kept], kept, width)
                for rows, kept, width in zip(images, kwargs[KEY], widths, strict=True)
            )
        found: list[Tensor] = []
        parts = zip(pixels.split(grids.prod(-1).tolist()), grids, widths, strict=True)
        for part, grid, width in parts:
            whole = int(grid.prod()) // merge**2
            inputs = {"pixel_values": part, "image_grid_thw": grid[None]}
            (image,) = self._rows(whole, _left(self._pruner, whole), inputs)
            rows = torch.cat([image.embeddings, *image.added], 1)
            kept = torch.tensor(image.kept, device=rows.device)
            found.append(_with_places(rows, kept, width))
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
        places = [places_of(rows[:, -COLUMNS:]) for rows in multimodal_embeddings]
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        visual = ids == self.config.image_token_id
        positions = with_places(mrope_positions, visual, places, num_computed_tokens)
        delta = int(positions.max()) + 1 - len(ids)
        return [rows[:, :-COLUMNS] for rows in multimodal_embeddings], positions, delta

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights of the checkpoint."""
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
        if self._pruner is not None:  # vLLM's own tower cannot run yet
            self._try_out()
        return loaded

    def _try_out(self) -> None:
        """Prune one picture, so that what cannot be done fails before the first request."""
        vision = self.config.vision_config
        side = trial_side(getattr(self._pruner, "keep", 1)) * vision.spatial_merge_size
        values = 3 * vision.temporal_patch_size * vision.patch_size**2
        weight = next(self.visual.parameters())
        pixels = torch.linspace(-1, 1, side**2 * values).reshape(side**2, values).to(weight)
        grid = torch.tensor([[1, side, side]], device=weight.device)
        with suppress(BudgetError):  # other pictures have more tokens
            self.embed_multimodal(pixel_values=pixels, image_grid_thw=grid)


class _Info25(_Info, Qwen2_5_VLProcessingInfo):  # type: ignore[misc]
    pass


class _Processor25(_Processor, Qwen2_5_VLMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(
    _Processor25, info=_Info25, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class PoreQwen25VL(_Model, Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """Qwen2.5-VL, pruned."""


class _Info3(_Info, Qwen3VLProcessingInfo):  # type: ignore[misc]
    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        """Those of images: Qwen3-VL's own adds to those of videos, which are not served."""
        found = super(Qwen3VLProcessingInfo, self).get_supported_mm_processor_kwargs()
        return dict(found)


class _Processor3(_Processor, Qwen3VLMultiModalProcessor):  # type: ignore[misc]
    pass


@MULTIMODAL_REGISTRY.register_processor(
    _Processor3, info=_Info3, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class PoreQwen3VL(_Model, Qwen3VLForConditionalGeneration):  # type: ignore[misc]
    """Qwen3-VL, pruned."""


def _left(pruner: Pruner | None, whole: int) -> int:
    """How many tokens are left of so many, at most."""
    return whole if pruner is None else pruner.counts(whole, 1)[-1]


def _with_places(rows: Tensor, kept: Tensor, width: int) -> Tensor:
    """(k, D + 4) what is left of an image: features, those of DeepStack, row and column."""
    if bool((kept < 0).any()):
        raise UnsupportedModelError(
            "The method leaves tokens that stand for no place in the image, and this model gives "
            "every token one; use a method that only drops tokens."
        )
    return torch.cat([rows, place_columns(kept, width).to(rows.dtype)], 1)
