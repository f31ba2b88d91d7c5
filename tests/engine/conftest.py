"""The models of tests of the engine."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlavaForConditionalGeneration
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers.engine import _flash
from helpers.models import tiny_llava


@pytest.fixture(scope="module")
def eager() -> LlavaForConditionalGeneration:
    """Eager attention in float64, with masks that its softmax in float32 can take.

    transformers fills eager masks with the lowest number of the model's type. Its softmax casts to
    float32, where that of float64 is -inf: rows of left padding become NaN, and all else with them.
    """

    def finite(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"].clamp(min=-1e9)}

    model = tiny_llava(attention="eager")
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(finite, with_kwargs=True)
    return model


@pytest.fixture(scope="module")
def models(eager: LlavaForConditionalGeneration) -> dict[str, LlavaForConditionalGeneration]:
    """The same weights under every attention implementation."""
    ALL_ATTENTION_FUNCTIONS.register("flash_test", _flash)
    ALL_MASK_ATTENTION_FUNCTIONS.register("flash_test", flash_attention_mask)
    found = {"eager": eager}
    for name in ("sdpa", "flash_test"):
        found[name] = tiny_llava(attention="sdpa")
        found[name].model.language_model.config._attn_implementation_internal = name
    return found
