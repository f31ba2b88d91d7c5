"""Prompts that a small model answers to guide a large one, together and one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers.engine import _flash
from helpers.models import IMAGE, N, prompt, tiny_llava

PROMPTS = [prompt(3, 2, 5), prompt(9, 0, 4, 1), prompt(1, 1, 2, 2)]
STEPS = 4
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def alone(prompts: list[list[int]], inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """The inputs of one sample of a batch, without padding."""
    first = sum(ids.count(IMAGE) // N for ids in prompts[:row])
    count = prompts[row].count(IMAGE) // N
    one = {"input_ids": torch.tensor([prompts[row]])}
    if count:
        one["pixel_values"] = inputs["pixel_values"][first : first + count]
    return one


def with_attention(model: Any, name: str) -> Any:
    """The same weights under another attention implementation."""
    if name == "flash_test":
        ALL_ATTENTION_FUNCTIONS.register("flash_test", _flash)
        ALL_MASK_ATTENTION_FUNCTIONS.register("flash_test", flash_attention_mask)
    twin = tiny_llava(layers=len(model.model.language_model.layers))
    twin.load_state_dict(model.state_dict())
    twin.model.language_model.config._attn_implementation_internal = name
    return twin
