"""Processors and models as `pore.families.idefics3` is for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from processors.base import TOWER, Kind, config_of, made, processor, token_id, tokenizer


def _idefics3(kind: str, side: int, most: int, length: int) -> Any:
    images: Any
    if kind == "SmolVLM":
        from transformers.models.smolvlm import processing_smolvlm

        processing_smolvlm.num2words = str  # a package that only videos need
        from transformers.models.smolvlm.image_processing_pil_smolvlm import (
            SmolVLMImageProcessorPil as Processor,
        )
    else:
        from transformers.models.idefics3.image_processing_pil_idefics3 import (  # type: ignore[assignment]
            Idefics3ImageProcessorPil as Processor,
        )
    images = Processor(size={"longest_edge": most}, max_image_size={"longest_edge": side})
    tokens = tokenizer(
        "<end_of_utterance>",
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
    )
    more: dict[str, Any] = {"image_seq_len": length}
    if kind == "SmolVLM":  # what its chat template reads
        more["video_processor"] = SimpleNamespace(num_frames=1, fps=1)
    return processor(f"{kind}Processor", images, tokens, "<image>", **more)


def _idefics3_model(kind: str, side: int, patch: int, scale: int, tokens: Any) -> Any:
    config = config_of(
        *(f"{kind}Config", "LlamaConfig"),
        vision_config={**TOWER, "image_size": side, "patch_size": patch},
        scale_factor=scale,
        image_token_id=token_id(tokens, "<image>"),
    )
    return made(f"{kind}ForConditionalGeneration", config)


KINDS = [
    Kind(
        *("SmolVLM", "SmolVLM2-2.2B-Instruct"),
        lambda: _idefics3("SmolVLM", 384, 1536, 81),
        lambda tokens: _idefics3_model("SmolVLM", 384, 14, 3, tokens),
    ),
    Kind(
        *("Idefics3", "Idefics3-8B-Llama3"),
        lambda: _idefics3("Idefics3", 364, 1456, 169),
        lambda tokens: _idefics3_model("Idefics3", 364, 14, 2, tokens),
    ),
]
