"""Models of random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.bench import FASTV
from pore.bench.measuring import measure
from pore.bench.runs import Runner
from pore.bench.setup import build
from pore.bench.workload import Workload
from pore.errors import InputError, UnsupportedModelError


@pytest.mark.slow
def test_build() -> None:
    model: Any = build("llava-64x2", dtype=torch.bfloat16, attention="eager", seed=3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    decoder = model.model.language_model
    assert decoder.config._attn_implementation == "eager"
    assert bool((decoder.norm.weight == 1).all())
    assert bool((model.model.vision_tower.pre_layrnorm.bias == 0).all())
    weight = decoder.layers[0].mlp.gate_proj.weight.float()
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert weight.unique(dim=0).shape == weight.shape
    assert decoder.rotary_emb.inv_freq[0] == 1
    again: Any = build("llava-64x2", dtype=torch.bfloat16, attention="eager", seed=3)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    inputs = Runner(model, Workload(visual=576, text_before=2, text_after=3, new_tokens=1)).inputs
    with torch.inference_mode():
        logits = model(
            input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], logits_to_keep=1
        ).logits
    assert bool(torch.isfinite(logits).all())


@pytest.mark.usefixtures("quick_rates")
@pytest.mark.slow
def test_a_shape_is_built_as_asked() -> None:
    once = {"new_tokens": 1, "repeats": 1, "warmup": 0, "attainable": False}
    result = measure("llava-64x3", [], dtype=torch.bfloat16, attention="eager", **once)
    assert result.model["name"] == "llava-64x3, random weights"
    assert result.model["dtype"] == "bfloat16"
    assert result.model["attention"] == "eager"
    assert result.workload.visual == 576


def test_a_kernel_that_is_not_there() -> None:
    with pytest.raises(InputError, match="cannot be built with attention 'no_such_kernel'"):
        build("llava-64x2", attention="no_such_kernel")


def test_a_shape_that_is_none() -> None:
    with pytest.raises(UnsupportedModelError, match="is not a shape"):
        measure("llava-7", [FASTV])
