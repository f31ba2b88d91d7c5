"""TokenCarve: points by rank, groups, and a budget that is always met."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pore
from helpers.models import N, batch, prompt, tiny_llava
from pore.engine.stages import View
from pore.errors import BudgetError, ScoreError
from pore.layout import Image, Layout
from pore.methods.tokencarve import rank_points, singular_scores


def view(counts: list[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> View:
    """One image of each count, each in a prompt of its own, with random states and attention."""
    generator = torch.Generator().manual_seed(seed)
    length = max(counts) + 3
    images = [Image(i, 0, range(2, 2 + n)) for i, n in enumerate(counts)]
    tokens = torch.arange(length) < torch.tensor(counts)[:, None] + 3
    layout = Layout.of(images, tokens)
    states = torch.randn(len(counts), length, 6, generator=generator, dtype=torch.float64)
    attention = torch.rand(len(counts), max(counts), generator=generator, dtype=torch.float64)
    attention = attention.masked_fill(~layout.valid, 0.0)
    return View(layout, states.to(dtype), attention, None, generator, norm=lambda x: x)


def by_hand(states: Tensor, attention: Tensor, keep: int, weight: float) -> dict[int, Tensor]:
    """The tokens that stay of one image, with their states, token by token."""
    n = len(states)
    left, sizes, _ = torch.linalg.svd(states)
    information = [
        sum(abs(float(left[i, j])) * float(sizes[j]) for j in range(len(sizes))) for i in range(n)
    ]
    points = [0.0] * n
    for share, scores in ((weight, attention.tolist()), (1 - weight, information)):
        for rank, i in enumerate(sorted(range(n), key=lambda i: -scores[i])):
            points[i] += share * (n - rank)
    chosen = sorted(range(n), key=lambda i: -points[i])[: min(keep * 3 // 2, n)]
    better, rest = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]

    def like(b: int, a: int) -> float:
        return float(torch.cosine_similarity(states[b], states[a], dim=0))

    partner = {b: max(better, key=lambda a: like(b, a)) for b in rest if better}
    closest = sorted(partner, key=lambda b: -like(b, partner[b]))[: len(chosen) - keep]
    groups = {a: [a, *(b for b in closest if partner[b] == a)] for a in better}
    stays = {a: states[group].mean(0) for a, group in groups.items()}
    return stays | {b: states[b] for b in rest if b not in closest}


counts = st.lists(st.integers(1, 24), min_size=1, max_size=3)
# Quarters: sums of ranks times these are exact in float32, so that equal points are equal here too.
weights = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@given(counts, st.integers(0, 2**20), st.floats(0.05, 1.0), weights)
def test_is_what_its_rule_says_image_by_image(
    counts: list[int], seed: int, keep: float, weight: float
) -> None:
    seen, pruner = view(counts, seed), pore.TokenCarve(keep, weight=weight)
    try:
        budgets = seen.budget(keep)
    except BudgetError:
        with pytest.raises(BudgetError, match="rounds to none"):
            pruner._select(seen)
        return
    made = pruner._select(seen)
    assert made.keep.sum(-1).tolist() == budgets
    states = seen.features if made.features is None else made.features
    for i, n in enumerate(counts):
        own = seen.features[i, :n]
        expected = by_hand(own, seen.attention[i, :n], budgets[i], weight)
        assert made.keep[i].nonzero()[:, 0].tolist() == sorted(expected)
        for place, state in expected.items():
            torch.testing.assert_close(states[i, place], state)
        dropped = ~made.keep[i, :n]
        assert torch.equal(states[i, :n][dropped], own[dropped])


@pytest.mark.parametrize(("keep", "chosen", "better"), [(64, 96, 48), (63, 94, 47), (1, 1, 0)])
def test_the_authors_numbers(keep: int, chosen: int, better: int) -> None:
    """Half more than are kept go on, and those too many are merged into the better half."""
    seen = view([200])
    made = pore.TokenCarve(keep)._select(seen)
    assert int(made.keep.sum()) == keep
    merged = 0
    if made.features is not None:
        changed = (made.features != seen.features).any(-1)
        assert 0 < int(changed.sum()) <= better
        merged = chosen - keep
    assert merged == int(keep / 2)


def test_keeping_all_merges_nothing() -> None:
    seen = view([7, 12])
    made = pore.TokenCarve(1.0)._select(seen)
    assert torch.equal(made.keep, seen.layout.valid)
    assert made.features is None


def test_what_joins_one_token_becomes_one_mean() -> None:
    """Of the best six, all of the worse three point where the second best does."""
    states = torch.tensor([[9.0, 0], [0, 8], [-7, 0], [0, 2], [0, 4], [0, 5], [1, -1], [1, 1]])
    attention = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]).double()
    seen = view([8])
    hidden = torch.zeros(1, 11, 2).double()
    hidden[0, 2:10] = states
    seen = replace(seen, hidden_states=hidden, attention=attention[None])
    made = pore.TokenCarve(4, weight=1.0)._select(seen)
    # Of equal ones the earlier joins: 8, 2 and 4 have a mean of 14 / 3.
    assert made.keep[0].tolist() == [True, True, True, False, False, True, False, False]
    assert made.features is not None
    assert made.features[0, 1].tolist() == pytest.approx([0, 14 / 3])
    assert made.features[0, 5].tolist() == [0, 5]


def test_singular_scores_do_not_need_more_channels_than_tokens() -> None:
    seen = view([4, 20])
    scores = singular_scores(seen.features, seen.layout.valid)
    for i, n in enumerate((4, 20)):
        left, sizes, _ = torch.linalg.svd(seen.features[i, :n])
        expected = left[:, : len(sizes)].abs() @ sizes
        torch.testing.assert_close(scores[i, :n], expected)
        assert not scores[i, n:].any()


def test_points_are_whole_numbers_by_rank() -> None:
    valid = torch.tensor([[True, True, True, False]])
    points = rank_points(torch.tensor([[0.25, 0.5, 0.25, 9.0]]), valid)
    assert points[0, :3].tolist() == [2, 3, 1]


def test_reweighting_divides_the_attention_before_it_is_ranked() -> None:
    bias = pore.PositionBias.exponential(0.2, 16)
    seen = view([16, 16])
    divided = replace(seen, attention=seen.attention / bias.values)
    made = pore.TokenCarve(6)._select(replace(seen, correction=bias))
    expected = pore.TokenCarve(6)._select(divided)
    assert torch.equal(made.keep, expected.keep)
    assert made.features is not None
    assert expected.features is not None
    assert torch.equal(made.features, expected.features)
    assert not torch.equal(made.keep, pore.TokenCarve(6)._select(seen).keep)


def test_half_precision_is_computed_in_float32() -> None:
    seen = view([20, 9], dtype=torch.bfloat16)
    made = pore.TokenCarve(6)._select(seen)
    wide = replace(seen, hidden_states=seen.hidden_states.float())
    expected = pore.TokenCarve(6)._select(wide)
    assert torch.equal(made.keep, expected.keep)
    assert made.features is not None
    assert expected.features is not None
    assert made.features.dtype == torch.bfloat16
    assert torch.equal(made.features, expected.features.bfloat16())


def test_after_another_method() -> None:
    model = tiny_llava()
    chain = pore.Chain(pore.FastV(12, layer=1), pore.TokenCarve(5, layer=3))
    with torch.no_grad(), chain(model) as run:
        model(**batch([prompt(3, 1, 5), prompt(2, 2, 4, 1)]))
    for sample in run.report:
        for image in sample.images:
            assert len(image.kept) == 5
            assert set(image.kept) <= set(image.stages[0][1])


def test_gradients_go_through_the_means() -> None:
    model = tiny_llava()
    inputs = batch([prompt(3, 1, 5)])
    with pore.TokenCarve(5)(model):
        model(**inputs).logits[0, -1].sum().backward()
    grad = model.model.multi_modal_projector.linear_1.weight.grad
    assert grad is not None
    assert bool(grad.any())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "at least 1"),
        ({"weight": -0.1}, "share from 0 to 1"),
        ({"weight": float("nan")}, "share from 0 to 1"),
        (
            {"weight": 0.0, "reweight": pore.PositionBias.exponential(0.1, N)},
            "reweight has nothing to divide",
        ),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((BudgetError, ScoreError), match=message):
        pore.TokenCarve(**{"keep": 5, **settings})


def test_attention_that_is_no_number_is_refused() -> None:
    seen = view([6])
    seen.attention[0, 2] = torch.nan
    with pytest.raises(ScoreError, match="NaN"):
        pore.TokenCarve(3)._select(seen)
