"""Gradient checkpointing changes no gradient: what is computed again is what was computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pore
from cases import CASES
from cases.base import Case
from helpers.checkpointing import turn_off, turn_on
from helpers.families import KEEP as FEW
from helpers.families import PROMPTS as FAMILY_PROMPTS
from helpers.families import refusal
from helpers.families import usual as usual_of
from helpers.methods import EVERY, KEEP, LAYERS, usual
from helpers.models import batch, tiny_llava
from helpers.training import PROMPTS, loss
from pore.engine.pruner import Pruner
from pore.errors import UnsupportedModelError


def gradients(model: Any, pruner: Pruner, inputs: dict[str, Tensor], late: bool) -> Any:
    """Gradients of one step, whose backward comes in the block or after it, and what was kept."""
    model.zero_grad()
    with pruner(model) as run:
        out = loss(model, inputs)
        if not late:
            out.backward()
    if late:
        out.backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    return grads, [sample.images for sample in run.report]


def check(model: Any, pruner: Pruner, inputs: dict[str, Tensor], **how: Any) -> None:
    expected, kept = gradients(model, pruner, inputs, late=False)
    turn_on(model, **how)
    try:
        for late in (False, True):
            got, again = gradients(model, pruner, inputs, late)
            assert again == kept
            assert got.keys() == expected.keys()
            for key, grad in expected.items():
                torch.testing.assert_close(got[key], grad, rtol=1e-6, atol=1e-9)
    finally:
        turn_off(model)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("name", EVERY)
def test_every_method(name: str, reentrant: bool) -> None:
    model = tiny_llava(layers=LAYERS, tower_layers=4).train()
    if reentrant:  # which needs inputs with gradients
        model.enable_input_require_grads()
    pruner, why = usual(name, KEEP), None
    if name == "ToMe":
        why = "turn gradient checkpointing off"
    elif reentrant and name in {"PruMerge", "PruMerge+", "VisionZip"}:  # merged by keys
        why = "use use_reentrant=False"
    if why is None:
        check(model, pruner, batch(PROMPTS), use_reentrant=reentrant)
        return
    how = {"use_reentrant": reentrant}
    turn_on(model, **how)
    with pytest.raises(UnsupportedModelError, match=why), pruner(model):
        model(**batch(PROMPTS), use_cache=False)
    with torch.no_grad(), pruner(model):  # nothing is computed again
        model(**batch(PROMPTS), use_cache=False)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in CASES
        for name in ("FastV", "PyramidDrop", "SparseVLM", "DivPrune", "VisionZip")
        if refusal(case, name) is None
    ],
)
def test_every_family(case: Case, name: str) -> None:
    model = case.build()
    if not model.supports_gradient_checkpointing:
        pytest.skip("transformers itself checkpoints nothing here")
    inputs = case.inputs(FAMILY_PROMPTS["ragged"])
    check(model.train(), usual_of(name, FEW, case), inputs, use_reentrant=False)


def test_turned_on_inside_the_block() -> None:
    model, inputs = tiny_llava(layers=LAYERS).train(), batch(PROMPTS)
    expected, _ = gradients(model, pore.FastV(KEEP), inputs, late=False)
    model.zero_grad()
    with pore.FastV(KEEP)(model):
        turn_on(model)
        loss(model, inputs).backward()
        loss(model, inputs)
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-6, atol=1e-9)
    model(**inputs, use_cache=False).logits.sum().backward()  # unpruned
