"""Training through a pruned model: gradients are those of what was computed, merges and all.

A slope along a random direction of all parameters, measured by two forwards in float64, knows
nothing of autograd, and holds for every method: so small a step changes no choice.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import pore
from helpers.methods import EVERY, KEEP, LAYERS, in_decoder, usual
from helpers.models import IMAGE, N, batch, tiny_llava, tiny_siglip_llava
from helpers.reference import dropped_by_stage, masked_from
from helpers.training import PROMPTS, loss
from pore.engine.pruner import Pruner

FAITHFUL: list[Pruner] = [
    pore.DivPrune(KEEP, faithful=True),
    pore.PruMerge(5, neighbours=3, faithful=True),
    pore.PruMergePlus(KEEP, neighbours=3),
    pore.VisionZip(N, 2, faithful=True),
    pore.ToMe(r=[2, 0, 1], proportional=False, weighted=False),
    pore.SparseVLM((12, 8, 4), (2, 4, 6), faithful=True),
    pore.Scored(KEEP, lambda states, layout, _: layout.gather(states)[..., 0], layer=3),
    pore.Chain(pore.VisionZip(9), pore.FastV(KEEP)),
]


def check_slope(model: Any, pruner: Pruner, inputs: dict[str, Tensor]) -> list[Any]:
    """Gradients of a pruned model are the slope of its loss; what was kept."""
    with pruner(model) as run:
        loss(model, inputs).backward()
        kept = [sample.images for sample in run.report]
    generator = torch.Generator().manual_seed(5)
    along, slope = [], 0.0
    for parameter in model.parameters():
        step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        step *= parameter.detach().abs().mean() + 1e-3
        along.append(step)
        if parameter.grad is not None:
            slope += float((parameter.grad * step).sum())
    ends = []
    for size in (1e-7, -2e-7):
        with torch.no_grad():
            for parameter, step in zip(model.parameters(), along, strict=True):
                parameter += size * step
            with pruner(model) as run:
                ends.append(float(loss(model, inputs)))
        assert [sample.images for sample in run.report] == kept
    measured = (ends[0] - ends[1]) / 2e-7
    assert slope == pytest.approx(measured, rel=1e-5)
    return kept


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_the_slope(name: str) -> None:
    model = copy.deepcopy(tiny_llava(layers=LAYERS, tower_layers=4)).train()
    check_slope(model, usual(name, KEEP), batch(PROMPTS))


@pytest.mark.parametrize("pruner", FAITHFUL, ids=lambda one: repr(one).partition(" at 0x")[0])
def test_gradients_are_the_slope_with_other_settings(pruner: Pruner) -> None:
    model = copy.deepcopy(tiny_llava(layers=LAYERS, tower_layers=4)).train()
    check_slope(model, pruner, batch(PROMPTS))


@pytest.mark.parametrize(
    "pruner",
    [
        pore.VisionZip(KEEP),
        pore.PruMerge(KEEP, 3),
        pore.ToMe(KEEP),
        pore.HiPrune(KEEP, object_layer=1),
    ],
    ids=lambda one: repr(one).partition(" at 0x")[0],
)
def test_gradients_are_the_slope_in_a_tower_without_cls(pruner: Pruner) -> None:
    check_slope(tiny_siglip_llava(layers=3).train(), pruner, batch(PROMPTS))


@pytest.mark.parametrize("name", [name for name in EVERY if in_decoder(usual(name, KEEP))])
def test_gradients_equal_those_of_the_masked_dense_model(name: str) -> None:
    """The loss of the last tokens, of every parameter: what was dropped has none from there on."""
    model, inputs = tiny_llava(layers=LAYERS, tower_layers=4).train(), batch(PROMPTS)
    with usual(name, KEEP)(model) as run:
        loss(model, inputs).backward()
    got = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    stages = dropped_by_stage(run, inputs["input_ids"] == IMAGE)
    model.zero_grad()
    tokens = inputs["attention_mask"].bool()
    with masked_from(model.model.language_model.layers, stages, tokens):
        loss(model, inputs).backward()
    expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(got[key], grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", EVERY)
def test_keeping_all_leaves_the_gradients_as_they_are(name: str) -> None:
    model, inputs = tiny_llava(layers=LAYERS, tower_layers=4).train(), batch(PROMPTS)
    grads = []
    for pruner in (None, usual(name, N)):
        model.zero_grad()
        if pruner is None:
            loss(model, inputs).backward()
        else:
            with pruner(model):
                loss(model, inputs).backward()
        grads.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-9, atol=1e-11)
