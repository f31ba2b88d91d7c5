"""SCOPE: a greedy choice by coverage and attention, against the definition written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pore
from helpers.golden_files import Made, draw
from helpers.golden_models import tower_view
from helpers.models import batch, prompt, tiny_llava
from methods import golden_scope
from pore.errors import BudgetError, PoreError, ScoreError
from pore.layout import Tiling
from pore.methods.scope import Combine, covering
from pore.tensors.gathering import cosine


def by_hand(
    features: Tensor, weights: list[float], count: int, combine: Combine = "multiply"
) -> list[int]:
    """The order of choice among patches (N, C), pair by pair."""
    unit = [row / row.norm() for row in features]
    n, chosen = len(unit), []
    best = [0.0] * n
    for _ in range(count):
        scores = []
        for j in range(n):
            gain = sum(max(0.0, float(unit[i] @ unit[j]) - best[i]) for i in range(n))
            scores.append(gain * weights[j] if combine == "multiply" else gain + weights[j])
        pick = max((j for j in range(n) if j not in chosen), key=lambda j: scores[j])
        chosen.append(pick)
        best = [max(best[i], float(unit[i] @ unit[pick])) for i in range(n)]
    return chosen


def problem(images: int, patches: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features (I, N, 5) and attention (1, I, 2, N)."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, patches, 5, generator=generator, dtype=torch.float64)
    attention = torch.rand(1, images, 2, patches, generator=generator, dtype=torch.float64)
    return features, attention


class TestChoice:
    @given(
        st.integers(1, 12),
        st.data(),
        st.sampled_from([0.5, 1.0, 2.0]),
        st.sampled_from(["multiply", "add"]),
        st.integers(0, 999),
    )
    def test_as_by_hand(
        self, patches: int, data: Any, alpha: float, combine: Combine, seed: int
    ) -> None:
        keep = data.draw(st.integers(1, patches))
        features, attention = problem(2, patches, seed)
        method = pore.SCOPE(keep, alpha, combine)
        selection = method._select(tower_view(features, attention))
        for raster, states, heads in zip(selection.raster, features, attention[0], strict=True):
            weights = [float(s) ** alpha for s in heads.sum(0)]
            assert raster.tolist() == sorted(by_hand(states, weights, keep, combine))

    def test_a_patch_of_negative_cosine_takes_nothing_away(self) -> None:
        """Patch 3, opposite to patches 0 to 2, covers itself alone, and is worth more than patch 4,
        which patch 1 covers a little. With negative cosines counted it would come last."""
        angles = torch.tensor([[0.0, 0.1, -0.1, 3.14, 1.4]])
        features = torch.stack([angles.cos(), angles.sin()], -1)
        order, rank = covering(
            cosine(features, features), torch.ones(1, 5), 2, torch.ones(1, 5, dtype=torch.bool)
        )
        assert order.tolist() == [[1, 3]]
        assert rank.tolist() == [[2, 0, 2, 1, 2]]

    def test_duplicates_are_chosen_once(self) -> None:
        features, attention = torch.ones(1, 4, 3), torch.ones(1, 1, 1, 4)
        selection = pore.SCOPE(3)._select(tower_view(features, attention))
        assert selection.raster.tolist() == [[0, 1, 2]]

    def test_heads_are_summed(self) -> None:
        """Which matters where attention is added to the gain: the mean would be too small."""
        features = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]])
        attention = torch.tensor([0.0, 0.0, 0.3]).expand(1, 1, 4, 3)
        for combine, expected in (("add", [[2]]), ("multiply", [[2]])):
            selection = pore.SCOPE(1, combine=combine)._select(  # type: ignore[arg-type]
                tower_view(features, attention)
            )
            assert selection.raster.tolist() == expected
        few = tower_view(features, attention[:, :, :1])
        assert pore.SCOPE(1, combine="add")._select(few).raster.tolist() != [[2]]


class TestTiles:
    """An image of three tiles of 16 patches, of which 6 of the last show padding alone."""

    tiling = Tiling(3, (1, 2), 16, tuple(range(42)))

    def test_padding_neither_counts_nor_is_chosen(self) -> None:
        features, attention = problem(3, 16, 0)
        view = tower_view(features, attention, tilings=(self.tiling,))
        selection = pore.SCOPE(12)._select(view)
        weights = attention[0, 2, :, :10].sum(0).tolist()
        assert selection.raster[2].tolist() == sorted(by_hand(features[2, :10], weights, 4))

    def test_the_authors_round_down_and_choose_among_padding(self) -> None:
        features, attention = problem(3, 16, 0)
        view = tower_view(features, attention, tilings=(self.tiling,))
        selection = pore.SCOPE(14, faithful=True)._select(view)
        assert selection.raster.shape == (3, 4)
        assert not selection.structure
        weights = attention[0, 2].sum(0).tolist()
        assert selection.raster[2].tolist() == sorted(by_hand(features[2], weights, 4))
        with pytest.raises(BudgetError, match="less than one token"):
            pore.SCOPE(2, faithful=True)._select(view)


def test_the_authors_share_out_among_the_images_of_a_batch() -> None:
    model, inputs = tiny_llava(), batch([prompt(3, 1, 5), prompt(9, 1, 4, 1)])
    for faithful, expected in ((False, 7), (True, 3)):
        with torch.no_grad(), pore.SCOPE(7, faithful=faithful)(model) as run:
            model(**inputs)
        assert {len(image.kept) for sample in run.report for image in sample.images} == {expected}


@given(st.integers(1, 3), st.integers(1, 9), st.data())
def test_the_authors_total_is_any_of_all_images_together(
    images: int, patches: int, data: Any
) -> None:
    """More than one image has too, up to all tokens of all; the rest of the division is lost."""
    keep = data.draw(st.integers(images, images * patches))
    features, attention = problem(images, patches, keep)
    selection = pore.SCOPE(keep, faithful=True)._select(tower_view(features, attention))
    assert selection.raster.shape == (images, keep // images)
    alone = pore.SCOPE(keep // images)._select(tower_view(features, attention))
    assert torch.equal(selection.raster, alone.raster)
    with pytest.raises(BudgetError, match=f"at most {images * patches}"):
        pore.SCOPE(images * patches + 1, faithful=True)._select(tower_view(features, attention))


@pytest.mark.parametrize("alpha", [-0.5, float("nan"), float("inf")])
def test_alpha_is_a_power(alpha: float) -> None:
    with pytest.raises(ScoreError, match="alpha"):
        pore.SCOPE(4, alpha)


def test_combine_is_a_word() -> None:
    with pytest.raises(PoreError, match="'multiply' or 'add'"):
        pore.SCOPE(4, combine="multi")  # type: ignore[arg-type]


def test_overflow_is_an_error() -> None:
    features, attention = problem(1, 9, 0)
    attention[..., 3] = float("nan")
    with pytest.raises(ScoreError, match="NaN"):
        pore.SCOPE(4)._select(tower_view(features, attention))


# -- the checker of golden files, on files made here -----------------------------------------------


CASES = [(False, "multi"), (False, "add"), (True, "add")]


@pytest.mark.parametrize(("attention", "combine"), CASES)
def test_scope(attention: bool, combine: str) -> None:
    features, heads = draw(3, 2, 20, 7), draw(4, 2, 3, 20).softmax(-1)
    alpha, word = 1.5, golden_scope._COMBINE[combine]
    weights = [[float(s) ** alpha if attention else 1.0 for s in row.sum(0)] for row in heads]
    order = torch.tensor([by_hand(f, w, 6, word) for f, w in zip(features, weights, strict=True)])
    unit = features / features.norm(dim=-1, keepdim=True)
    tensors = {
        "features": features,
        "selected_order": order,
        "kept_indices": order.sort(1).values,
        "similarity": unit[0] @ unit[0].T,
    }
    if attention:
        tensors |= {"cls_attention_heads": heads, "cls_attention_sum": heads.sum(1)}
    params = {"keep": 6, "alpha": alpha, "combine": combine, "attention": attention}
    golden_scope.check(Made(params, tensors))
