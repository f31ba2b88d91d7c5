"""Models that are let go, and runs within runs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pore
import pore.engine.calls
from helpers.interrupting import whole_state
from helpers.lifetimes import generated, kinds, logits, model_of
from helpers.models import N, batch, prompt
from pore.bench.measuring import measure, measure_calibration
from pore.errors import ModelStateError
from pore.evaluation.running import evaluate


@pytest.mark.parametrize("attention", ["sdpa", "flash_test"])
@kinds
def test_an_applied_model_is_freed(pruner: Any, attention: str) -> None:
    """Without `remove`, and the names of its kernels with it."""
    model_of(attention)  # registers the kernel
    kernels = set(ALL_ATTENTION_FUNCTIONS)
    model = model_of(attention)
    gone = weakref.ref(model)
    pruner.apply(model)
    logits(model)
    generated(model)
    del model
    gc.collect()
    assert gone() is None
    assert set(ALL_ATTENTION_FUNCTIONS) == kernels


@kinds
def test_a_report_keeps_no_model(pruner: Any) -> None:
    model = model_of()
    with pruner(model) as run:
        logits(model)
    report, gone = run.report, weakref.ref(model)
    applied = pruner.apply(model).report
    logits(model)
    del model, run
    gc.collect()
    assert gone() is None
    assert [len(one.samples) for one in (report, applied)] == [1, 1]
    assert report.samples[0].images[0].seen == N


def test_a_block_in_a_generator_that_nobody_finishes() -> None:
    model = model_of()
    before = whole_state(model)

    def blocks() -> Any:
        with pore.FastV(keep=4, layer=1)(model):
            yield logits(model)

    one = blocks()
    next(one)
    assert whole_state(model) != before
    del one
    assert whole_state(model) == before


def inner(model: Any) -> Any:
    return model.model


def sharing(model: Any) -> Any:
    """Another model with the same decoder."""
    other = model_of()
    other.model.language_model = model.model.language_model
    return other


@pytest.mark.parametrize("other", [inner, sharing, torch.compile], ids=lambda f: f.__name__)
@pytest.mark.parametrize("outer_first", [True, False])
@kinds
def test_a_second_pruner_is_refused(pruner: Any, other: Any, outer_first: bool) -> None:
    model = model_of()
    second = other(model)
    pair = (model, second) if outer_first else (second, model)
    state = whole_state(model)
    for way in ("with", "apply"):
        if way == "apply":
            pruner.apply(pair[0])
        with pruner(pair[0]) if way == "with" else pore.changes.Changes():
            inside = whole_state(model)
            for another in (pruner, pore.FastV(keep=4, layer=1), pore.DivPrune(keep=4)):
                with pytest.raises(ModelStateError, match="already pruned"), another(pair[1]):
                    pass
            assert whole_state(model) == inside
        pore.remove(pair[0])
        assert whole_state(model) == state


def test_remove_by_a_part_or_by_the_whole() -> None:
    model = model_of()
    before = whole_state(model)
    for one, other in ((model, model.model), (model.model, model)):
        pore.FastV(keep=4, layer=1).apply(one)
        pore.DivPrune(keep=4).apply(other)  # in its place
        pore.remove(one)
        assert whole_state(model) == before
        with pore.FastV(keep=4, layer=1)(one), pytest.raises(ModelStateError, match="with"):
            pore.remove(other)


@pytest.mark.parametrize("of", [lambda model: model, inner], ids=["model", "inner"])
def test_nothing_is_measured_in_a_block(of: Any) -> None:
    """Calibration, guides, fits, speed and accuracy are of the unpruned model."""
    model = model_of()
    inputs = batch([prompt(3, 1, 5)], dtype=torch.float32)
    samples = [pore.Sample("a", "b.png", "c", "d")]
    works: list[Callable[[], Any]] = [
        lambda: pore.calibrate(model, None, samples, layer=1),
        lambda: pore.calibrate_guide(model, None, samples, max_new_tokens=1),
        lambda: pore.guide(model, inputs, max_new_tokens=1),
        lambda: pore.FitPrune.fit(model, [inputs]),
        lambda: measure(model, [], repeats=1),
        lambda: measure_calibration(model, 1, repeats=1),
        lambda: evaluate(model, None, samples, None),
    ]
    with pore.FastV(keep=4, layer=1)(of(model)):
        for work in works:
            with pytest.raises(ModelStateError, match="already pruned"):
                work()
