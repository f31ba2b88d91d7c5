"""Kernels by name, and the config that names them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import modeling_utils

from helpers.models import batch, prompt, tiny_llava
from pore._compat.attention import (
    attention_kernel,
    attention_name,
    forget_attention,
    kernel_names,
    layer_number,
    register_attention,
    uses_flash,
    with_attention,
)
from pore.families.registry import family_of


def test_kernels_and_makers_of_masks_have_names() -> None:
    """`ALL_ATTENTION_FUNCTIONS` and `ALL_MASK_ATTENTION_FUNCTIONS` list them."""
    before = kernel_names()
    assert before.count("sdpa") == 2
    modeling_utils.ALL_ATTENTION_FUNCTIONS.register("pore_test", lambda *_: None)
    assert sorted([*before, "pore_test"]) == sorted(kernel_names())
    forget_attention("pore_test")
    assert kernel_names() == before


def test_attention_of_a_config() -> None:
    """`config._attn_implementation`, read from `_attn_implementation_internal`."""
    model = tiny_llava(attention="sdpa")
    config = model.model.language_model.config
    assert attention_name(config) == "sdpa"
    assert not uses_flash(config)
    own = with_attention(config, "flash_of_ours")
    assert type(own) is type(config)
    assert attention_name(own) == "flash_of_ours"
    assert uses_flash(own)
    assert attention_name(config) == "sdpa"
    assert attention_name(nn.Linear(1, 1)) is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_modules_call_the_kernel_that_their_config_names(attention: str) -> None:
    """`ALL_ATTENTION_FUNCTIONS`, its `_global_mapping`, and `eager_attention_forward`."""
    model, inputs = tiny_llava(attention=attention), batch([prompt(3, 1, 5)])
    family = family_of(model)
    module: Any = family.attention(family.layers(model)[1])
    kernel = attention_kernel(module, attention)
    assert kernel is not None
    seen = []

    def ours(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen.append((module, query.shape, key.shape, sorted(kwargs)))
        return kernel(module, query, key, value, mask, **kwargs)

    config, before = module.config, dict(modeling_utils.ALL_ATTENTION_FUNCTIONS)
    with torch.no_grad():
        expected = model(**inputs).logits
        forget = register_attention("pore_test", ours)
        module.config = with_attention(config, "pore_test")
        try:
            logits = model(**inputs).logits
        finally:
            module.config = config
            forget()
    length = inputs["input_ids"].shape[1]
    [(which, query, key, names)] = seen
    assert which is module
    assert query == (1, 4, length, 8)
    assert key == (1, 2, length, 8)  # before they are repeated for the heads of a group
    assert "scaling" in names
    assert torch.equal(logits, expected)
    assert dict(modeling_utils.ALL_ATTENTION_FUNCTIONS) == before


def test_a_name_of_ours_goes_with_its_kernel() -> None:
    """`register_attention` holds no kernel alive, as transformers' own registry does."""
    known = modeling_utils.ALL_ATTENTION_FUNCTIONS
    before = dict(known)

    def ours(*_: Any) -> str:
        return "ours"

    forget = register_attention("pore_test", ours)
    assert known["pore_test"]() == "ours"
    del ours
    assert dict(known) == before
    forget()  # once more
    assert dict(known) == before


def test_a_module_without_eager_attention_has_no_kernel() -> None:
    assert attention_kernel(nn.Linear(1, 1), "eager") is None


def test_layers_have_the_number_of_their_place_in_the_cache() -> None:
    """`attention.layer_idx`."""
    model = tiny_llava()
    family = family_of(model)
    numbers = [layer_number(family.attention(layer)) for layer in family.layers(model)]
    assert numbers == list(range(len(numbers)))
