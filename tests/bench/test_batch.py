"""Benchmarks on a batch of a processor, for images of any size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import pore
from helpers.photographs import photograph
from pore.bench.measuring import measure
from pore.bench.table import table
from pore.bias.any_size import AnySizeBias
from pore.data.prompts import build_inputs
from pore.data.samples import noise
from pore.errors import InputError, UnsupportedModelError
from processors import KINDS
from processors.base import Kind, parts_or_skip

QUICK: dict[str, Any] = {"new_tokens": 3, "repeats": 1, "warmup": 0}
NAMES = ("InternVL", "LLaVA-NeXT", "Mistral 3", "Gemma 4", "Qwen2-VL", "Qwen3.5")
MEASURED = [kind for kind in KINDS if kind.name in NAMES]
PRUNER = pore.FastV(keep=0.25, layer=1)


@pytest.mark.usefixtures("quick_rates")
@pytest.mark.parametrize("kind", MEASURED, ids=str)
@pytest.mark.at_once(3)
def test_what_runs_is_the_batch_that_is_given(kind: Kind) -> None:
    processor, model = parts_or_skip(kind)
    inputs = build_inputs(processor, [noise((336, 224))] * 2)
    with_p = replace(PRUNER, reweight=AnySizeBias.rope(head_dim=8))
    result = measure(model, [PRUNER, with_p], inputs=inputs, **QUICK)
    work, (unpruned, plain, divided) = result.workload, result.settings
    assert (work.batch_size, work.prompt) == tuple(inputs["input_ids"].shape)
    assert unpruned.tokens == (work.prompt,) * 2
    assert plain.tokens == (work.prompt, work.prompt - work.visual + round(0.25 * work.visual))
    assert divided.tokens == plain.tokens
    assert divided.name == "FastV(keep=0.25, layer=1, reweight=rope)"
    with torch.no_grad(), PRUNER(model) as run:
        model(**inputs)
    (sample, _) = run.report
    assert (unpruned.flops and unpruned.flops.total) == sample.unpruned_flops
    assert (plain.flops and plain.flops.total) == sample.flops
    if kind.name == "Gemma 4":  # its FLOPs are not known
        assert {one["flops"] for one in result.to_dict()["settings"]} == {None}
        assert {one["roofline"] for one in result.to_dict()["settings"]} == {None}
        assert list(table(result, ("cost",)).columns[2].cells) == ["-"] * 3
        assert result.model["sizes"] is None
    assert sum(image.seen for image in sample.images) == work.visual


def test_a_model_of_any_size_must_be_told_the_size() -> None:
    (kind,) = (kind for kind in MEASURED if kind.name == "Mistral 3")
    _, model = parts_or_skip(kind)
    with pytest.raises(UnsupportedModelError, match="Say how large the image is, where"):
        measure(model, [PRUNER])


def test_prompts_that_differ_are_refused() -> None:
    (kind,) = (kind for kind in MEASURED if kind.name == "Mistral 3")
    processor, model = parts_or_skip(kind)
    one = noise((336, 224))
    for other in (
        replace(one, image=photograph("portrait")),
        replace(one, question="look at all of this"),
        replace(one, image=None),
    ):
        inputs = build_inputs(processor, [one, other])
        with pytest.raises(InputError, match="prompts of one length"):
            measure(model, [PRUNER], inputs=inputs, **QUICK)
    inputs = build_inputs(processor, [one])
    with pytest.raises(TypeError, match="batch_size"):
        measure(model, [PRUNER], inputs=inputs, batch_size=2)
