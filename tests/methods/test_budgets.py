"""Budgets by the mean over layers: found for every method, or refused with what it can do."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pore
from helpers.models import N, batch, prompt, tiny_llava
from pore.cost.named import model_shape
from pore.cost.shapes import ModelShape
from pore.errors import BudgetError, InputError
from pore.families.registry import shape_of
from pore.methods.budgets import schedule

SHAPE = model_shape("llava-1.5-7b")
LAYERS, VISUAL = SHAPE.decoder.layers, SHAPE.visual_tokens
EVERY = [
    name
    for name, kind in sorted(pore.methods().items())
    if kind.__module__.startswith("pore.") and kind.usual(64, SHAPE) is not None
]


def mean(pruner: pore.Pruner, shape: ModelShape = SHAPE) -> float:
    return sum(pruner.counts(shape.visual_tokens, shape.decoder.layers)) / shape.decoder.layers


@cache
def means(name: str) -> dict[int, float]:
    """The mean of every budget that a method can leave."""
    found = {}
    for keep in range(1, VISUAL + 1):
        usual = pore.methods()[name].usual(keep, SHAPE)
        assert usual is not None
        with suppress(BudgetError):
            found[keep] = mean(usual)
    return found


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=20)
@given(average=st.integers(1, VISUAL))
def test_nearest_of_all_budgets_or_none_is_low_enough(name: str, average: int) -> None:
    every = means(name)
    if min(every.values()) > average:
        with pytest.raises(BudgetError, match=f"cannot average {average} of 576"):
            schedule(name, SHAPE, average)
    else:
        found = schedule(name.upper(), SHAPE, average)
        assert type(found) is pore.methods()[name]
        best = min(abs(value - average) for value in every.values())
        assert abs(mean(found) - average) == best


def test_the_arithmetic_of_fastv() -> None:
    # (2 · 576 + 30 · 98) / 32 = 127.875
    assert schedule("FastV", SHAPE, 128) == pore.FastV(keep=98)
    assert schedule("FastV", SHAPE, 128, layer=3) == pore.FastV(keep=82, layer=3)
    assert schedule(pore.FasterVLM, SHAPE, 128) == pore.FasterVLM(keep=128)
    assert schedule(pore.FasterVLM, SHAPE, 2 / 9) == pore.FasterVLM(keep=128)
    assert schedule("fastv", SHAPE, 1.0) == pore.FastV(keep=576)
    bias = pore.PositionBias.exponential(0.001, 576)
    assert schedule("FastV", SHAPE, 128, reweight=bias).reweight == bias  # type: ignore[attr-defined]
    with pytest.raises(BudgetError, match=r"averages 36\.94 at least, because 2 layers see all"):
        schedule("FastV", SHAPE, 36)


def test_a_run_counts_what_was_asked_for() -> None:
    model = tiny_llava(layers=8)
    for name, average in (("FastV", 7), ("PyramidDrop", 10), ("FasterVLM", 5)):
        pruner = schedule(name, model, average)
        with pruner(model) as run, torch.no_grad():
            model(**batch([prompt(3, 1, 5)]))
        found = run.report.samples[0].mean_visual_tokens
        assert found == pytest.approx(mean(pruner, shape_of(model.config)))
        assert found == pytest.approx(average, abs=0.5)
    assert N == 16


class Narrow(pore.FasterVLM):
    """Can leave no fewer than 20 tokens."""

    name = property(lambda _: "Narrow")  # type: ignore[assignment] # so that it is not registered

    def counts(self, visual: int, layers: int) -> list[int]:
        if self.keep < 20:
            raise BudgetError("too few")
        return super().counts(visual, layers)


def test_budgets_that_a_method_cannot_leave_are_passed_over() -> None:
    assert schedule(Narrow, SHAPE, 20) == Narrow(keep=20)
    with pytest.raises(BudgetError, match="averages 20 at least"):
        schedule(Narrow, SHAPE, 19)


@pytest.mark.parametrize(
    ("average", "changes", "error", "message"),
    [
        (0, {}, BudgetError, "at least 1"),
        (1.5, {}, BudgetError, "not a fraction"),
        (577, {}, BudgetError, "as there are 576"),
        (128, {"keep": 3}, InputError, "'keep' beside its budget; it has faithful, layer"),
        (128, {"lair": 3}, InputError, "has no setting 'lair'"),
    ],
)
def test_what_is_refused(
    average: Any, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        schedule("FastV", SHAPE, average, **changes)


def test_methods_that_are_not_there_or_need_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no method 'magic'"):
        schedule("magic", SHAPE, 128)
    monkeypatch.setattr(pore.VTCCLS, "usual", lambda *_: None)
    with pytest.raises(InputError, match="VTC-CLS needs more than a model"):
        schedule("VTC-CLS", SHAPE, 128)


def test_a_model_of_other_sizes_is_another_schedule() -> None:
    small = replace(SHAPE, decoder=replace(SHAPE.decoder, layers=8))
    assert schedule("FastV", small, 288) == pore.FastV(keep=192)
