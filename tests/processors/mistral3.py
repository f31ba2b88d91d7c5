"""Processors and models as `pore.families.mistral3` is for."""

from __future__ import annotations

import sys
from typing import Any

from transformers.utils import is_torchvision_available

from processors.base import TOWER, Kind, config_of, made, processor, token_id, tokenizer


def _pixtral(patch: int, merge: int, most: int) -> Any:
    from transformers.models.pixtral import image_processing_pil_pixtral

    if not is_torchvision_available():
        # The processor reads one function of that module, which both backends have.
        name = "transformers.models.pixtral.image_processing_pixtral"
        sys.modules.setdefault(name, image_processing_pil_pixtral)
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    images = image_processing_pil_pixtral.PixtralImageProcessorPil(
        size={"longest_edge": most}, patch_size={"height": patch, "width": patch}
    )
    tokens = tokenizer("[IMG_BREAK]", "[IMG_END]", image_token="[IMG]")
    more: dict[str, Any] = {"patch_size": patch, "spatial_merge_size": merge}
    return processor(PixtralProcessor, images, tokens, "[IMG]", **more)


def _mistral3_model(kind: str, tokens: Any) -> Any:
    patch, side = (14, 1540) if kind == "Mistral3" else (16, 1024)
    more: dict[str, Any] = {"spatial_merge_size": 2}
    if kind == "Llava":
        more = {"vision_feature_select_strategy": "full"}
    config = config_of(
        *(f"{kind}Config", "MistralConfig"),
        vision_config={"model_type": "pixtral", **TOWER, "image_size": side, "patch_size": patch},
        vision_feature_layer=-1,
        image_token_index=token_id(tokens, "[IMG]"),
        **more,
    )
    return made(f"{kind}ForConditionalGeneration", config)


KINDS = [
    Kind(
        *("Mistral 3", "Mistral-Small-3.1-24B-Instruct-2503"),
        lambda: _pixtral(14, 2, 1540),
        lambda tokens: _mistral3_model("Mistral3", tokens),
        breaks=dict.fromkeys(("tiny", "one pixel"), "it squeezes a single visual token away"),
    ),
    Kind(
        *("Pixtral", "pixtral-12b"),
        lambda: _pixtral(16, 1, 1024),
        lambda tokens: _mistral3_model("Llava", tokens),
    ),
]
