"""A method of a few lines: what `ScoredPruner` brings, all that the engine asks of a method."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import pore
from helpers.methods import ends
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from helpers.reference import dropped_by_stage, masked_from
from pore.bias.position_bias import PositionBias
from pore.engine.readers import LastToken
from pore.engine.stages import View
from pore.errors import BudgetError, ProfileMismatchError
from pore.methods.scorer import ScoredPruner

with pytest.MonkeyPatch.context() as patch:  # other tests know nothing of these
    patch.setattr(pore.Pruner, "registry", {})

    @dataclass(frozen=True)
    class LargestNorm(ScoredPruner):
        """Keep the visual tokens with the largest states."""

        name: ClassVar[str] = "LargestNorm"

        def score(self, view: View) -> Tensor:
            return view.features.float().norm(dim=-1)

    @dataclass(frozen=True)
    class MostLookedAt(ScoredPruner):
        """Keep the visual tokens that the last text token attends to."""

        reweight: PositionBias | None = None

        name: ClassVar[str] = "MostLookedAt"
        reweightable: ClassVar[bool] = True
        earliest: ClassVar[int] = 1

        def reader(self) -> LastToken:
            return LastToken()

        def score(self, view: View) -> Tensor:
            return view.attention


RAGGED = [prompt(3, 2, 5), prompt(9, 0, 4, 1), prompt(1, 1, 2, 2)]


def test_it_is_short() -> None:
    assert len(inspect.getsource(LargestNorm).splitlines()) <= 12
    names = [field.name for field in dataclasses.fields(LargestNorm)]
    assert names == ["keep", "layer"]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("side", ["left", "right"])
class TestLargestNorm:
    def test_keeping_all_is_bit_equal(self, layer: int, side: str) -> None:
        model, inputs = tiny_llava(), batch(RAGGED, side)
        with torch.no_grad():
            dense = model(**inputs).logits
            with LargestNorm(1.0, layer)(model):
                assert torch.equal(model(**inputs).logits, dense)

    @pytest.mark.parametrize("keep", [5, 0.3])
    def test_budgets_are_met(self, layer: int, side: str, keep: int | float) -> None:
        model, inputs, pruner = tiny_llava(), batch(RAGGED, side), LargestNorm(keep, layer)
        with torch.no_grad(), pruner(model) as run:
            model(**inputs)
        assert pruner.counts(N, 5) == [N] * layer + [5] * (5 - layer)
        for sample, ids in zip(run.report, RAGGED, strict=True):
            assert all(len(image.kept) == 5 for image in sample.images)
            text, images = len(ids) - ids.count(IMAGE), len(sample.images)
            assert list(sample.tokens) == [text + images * n for n in pruner.counts(N, 5)]

    def test_the_largest_stay(self, layer: int, side: str) -> None:
        model, inputs, seen = tiny_llava(), batch(RAGGED, side), []

        class Spy(LargestNorm):
            def score(self, view: View) -> Tensor:
                seen.append((super().score(view), view.layout.valid))
                return seen[-1][0]

        with torch.no_grad(), Spy(5, layer)(model) as run:
            model(**inputs)
        ((scores, valid),) = seen
        images = [image for sample in run.report for image in sample.images]
        for image, row, own in zip(images, scores, valid, strict=True):
            best = sorted(range(int(own.sum())), key=lambda i: -float(row[i]))[:5]
            assert list(image.kept) == sorted(best)


def test_equals_masked_dense() -> None:
    model, inputs = tiny_llava(), batch(RAGGED)
    with torch.no_grad(), LargestNorm(5)(model) as run:
        short = model(**inputs).logits
    stages = dropped_by_stage(run, inputs["input_ids"] == IMAGE)
    tokens = inputs["attention_mask"].bool()
    with torch.no_grad(), masked_from(model.model.language_model.layers, stages, tokens):
        dense = model(**inputs, use_cache=False).logits
    kept = tokens & ~stages[-1][1]
    for row, got in enumerate(ends(short, tokens, kept.sum(1).tolist())):
        torch.testing.assert_close(got, dense[row, kept[row]], rtol=1e-6, atol=1e-6)


class TestWithAReader:
    bias = PositionBias.exponential(0.3, N)

    def kept(self, pruner: pore.Pruner) -> Any:
        model = tiny_llava()
        with torch.no_grad(), pruner(model) as run:
            model(**batch(RAGGED))
        return [sample.images for sample in run.report]

    @pytest.mark.parametrize("reweighted", [False, True])
    def test_is_fastv(self, reweighted: bool) -> None:
        bias = self.bias if reweighted else None
        assert self.kept(MostLookedAt(5, 3, bias)) == self.kept(pore.FastV(5, 3, bias))

    def test_refuses_a_bias_of_something_else(self) -> None:
        provenance = pore.Provenance(layer=2, normalize="visual")
        bias = dataclasses.replace(self.bias, provenance=provenance)
        with (
            pytest.raises(ProfileMismatchError, match="visual"),
            MostLookedAt(5, 2, bias)(tiny_llava()),
        ):
            pass


class TestBadSettings:
    @pytest.mark.parametrize("keep", [0, -1, 0.0, 1.5, True, "5"])
    def test_a_budget_that_cannot_be_meant(self, keep: Any) -> None:
        with pytest.raises(BudgetError, match="keep"):
            LargestNorm(keep)

    @pytest.mark.parametrize("layer", [-1, 5, True])
    def test_a_layer_that_is_not_there(self, layer: Any) -> None:
        with pytest.raises(BudgetError, match="choose 0 to 4"), LargestNorm(5, layer)(tiny_llava()):
            pass

    def test_no_layer_before_the_first(self) -> None:
        with pytest.raises(BudgetError, match="choose 1 to 4"), MostLookedAt(5, 0)(tiny_llava()):
            pass

    def test_more_than_there_are(self) -> None:
        with pytest.raises(BudgetError, match="more visual tokens than"):
            LargestNorm(N + 1).counts(N, 5)
