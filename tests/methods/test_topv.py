"""TopV: transport that ends on the targets, costs on the grid, and an exact budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pore
from helpers.models import SIDE, N, batch, prompt, tiny_llava
from pore.engine.stages import View
from pore.errors import BudgetError, ScoreError
from pore.layout import Image, Layout, Tiling
from pore.methods.topv import coordinates, evenly, scaled, squared_distance, transport


def view(sizes: list[tuple[int, int]], seed: int = 0, scale: float = 1.0) -> View:
    """One image of each size (height, width), each in a prompt of its own, with random states."""
    generator = torch.Generator().manual_seed(seed)
    length = max(h * w for h, w in sizes) + 2
    images = [Image(i, 0, range(1, 1 + h * w), (h, w)) for i, (h, w) in enumerate(sizes)]
    tokens = torch.arange(length) < torch.tensor([h * w + 2 for h, w in sizes])[:, None]
    layout = Layout.of(images, tokens)
    shape = (2, len(sizes), length, 5)
    before, after = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    states = {"states": layout.gather(before)}
    return View(layout, after, None, None, generator, norm=lambda x: x, memory=states)


sizes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3)
settings_of = st.fixed_dictionaries(
    {
        "recover": st.floats(0, 1),
        "iterations": st.integers(1, 4),
        "marginals": st.sampled_from(["norm", "uniform"]),
    }
)


@given(sizes, st.integers(0, 2**20), st.floats(0.05, 1.0), settings_of)
def test_budget_is_exact_and_a_batch_is_its_images(
    sizes: list[tuple[int, int]], seed: int, keep: float, settings: dict[str, Any]
) -> None:
    seen, pruner = view(sizes, seed), pore.TopV(keep, **settings)
    try:
        counts = seen.budget(keep)
    except BudgetError:
        with pytest.raises(BudgetError, match="rounds to none"):
            pruner._select(seen)
        return
    kept = pruner._select(seen).keep
    assert kept.sum(-1).tolist() == counts
    assert not (kept & ~seen.layout.valid).any()
    for i, (h, w) in enumerate(sizes):
        n = h * w
        layout = Layout.of([Image(0, 0, range(1, 1 + n), (h, w))], torch.ones(1, n + 2) > 0)
        alone = View(
            layout,
            seen.hidden_states[i, None, : n + 2],
            None,
            None,
            seen.generator,
            seen.norm,
            memory={"states": seen.memory["states"][i, None, :n]},
        )
        assert torch.equal(pruner._select(alone).keep[0], kept[i, :n])


@given(st.integers(0, 2**20), st.floats(0.01, 100.0))
def test_scale_of_the_states_does_not_matter(seed: int, scale: float) -> None:
    one, other = view([(4, 6)], seed), view([(4, 6)], seed, scale)
    assert torch.equal(pore.TopV(9)._select(one).keep, pore.TopV(9)._select(other).keep)


@given(st.integers(0, 2**20))
def test_importance_alone_moves_with_its_tokens(seed: int) -> None:
    """Turned upside down, the image keeps the same patches: nothing depends on their order."""
    one = view([(4, 6)], seed)
    turned = view([(4, 6)], seed)
    turned.memory["states"] = one.memory["states"].flip(1)
    turned.hidden_states[:, 1:25] = one.hidden_states[:, 1:25].flip(1)
    pruner = pore.TopV(9, recover=0.0)
    assert torch.equal(pruner._select(one).keep, pruner._select(turned).keep.flip(1))


class TestTransport:
    def problem(self, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        valid = torch.arange(8) < torch.tensor([8, 5])[:, None]
        cost = torch.rand(2, 8, 8, generator=generator, dtype=torch.float64) * 5
        weights = torch.rand(2, 2, 8, generator=generator, dtype=torch.float64) + 0.1
        weights = weights.masked_fill(~valid, 0)
        source, target = weights / weights.sum(-1, keepdim=True)
        return cost, source, target, valid

    @given(st.integers(0, 2**20), st.integers(1, 6))
    def test_ends_on_the_targets(self, seed: int, iterations: int) -> None:
        cost, source, target, valid = self.problem(seed)
        plan = transport(cost, source, target, valid, iterations)
        torch.testing.assert_close(plan.sum(1), target)
        torch.testing.assert_close(plan.sum((1, 2)), torch.ones(2).double())
        assert not plan[~(valid[:, :, None] & valid[:, None])].any()
        assert bool((plan >= 0).all())

    @given(st.integers(0, 2**20))
    def test_is_what_plain_scaling_gives(self, seed: int) -> None:
        cost, source, target, valid = self.problem(seed)
        plan = (-cost).exp() * (valid[:, :, None] & valid[:, None])
        for number in range(3):
            if number:
                plan = plan * (source / plan.sum(2).clamp(min=1e-300))[:, :, None]
            plan = plan * (target / plan.sum(1).clamp(min=1e-300))[:, None]
        torch.testing.assert_close(transport(cost, source, target, valid, 3), plan)

    def test_come_to_rest_the_cost_ranks_nothing(self) -> None:
        """Why there are few iterations: in the end the rows' sums are the sources' marginal."""
        cost, source, target, valid = self.problem(0)
        few, many = (transport(cost, source, target, valid, n).sum(-1) for n in (2, 500))
        torch.testing.assert_close(many, source)
        assert not torch.allclose(few, source, rtol=1e-2)

    def test_costs_beyond_the_range_of_exp(self) -> None:
        cost, source, target, valid = self.problem(0)
        plan = transport(cost.float() * 1e4, source.float(), target.float(), valid, 3)
        assert bool(torch.isfinite(plan).all())
        torch.testing.assert_close(plan.sum(1), target.float())


def test_every_cost_counts() -> None:
    kept = []
    for only in ("feature", "spatial", "central"):
        weights = dict.fromkeys(("feature", "spatial", "central"), 0.0) | {only: 1.0}
        kept.append(pore.TopV(6, **weights, marginals="uniform")._select(view([(5, 5)])).keep)
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    # The centre is nearest to itself: with nothing else, its row is the cheapest.
    near = pore.TopV(1, feature=0, spatial=0, central=1, marginals="uniform", iterations=1)
    assert near._select(view([(5, 5)])).keep[0].nonzero().tolist() == [[12]]


class TestCosts:
    @given(st.integers(0, 2**20))
    def test_squared_distance(self, seed: int) -> None:
        one, other = torch.randn(2, 2, 5, 3, dtype=torch.float64)
        expected = torch.cdist(one, other).square()
        torch.testing.assert_close(squared_distance(one, other), expected)

    def test_half_precision_is_computed_in_float32(self) -> None:
        states = torch.full((1, 2, 4), 300.0, dtype=torch.float16)
        assert squared_distance(states, -states).tolist() == [[[1440000.0] * 2] * 2]

    def test_scaled_to_each_image(self) -> None:
        cost = torch.tensor([[[4.0, 2.0], [3.0, 2.0]], [[7.0, 9.0], [9.0, 9.0]]])
        valid = torch.tensor([[True, True], [True, False]])
        assert scaled(cost, valid).tolist() == [[[1.0, 0.0], [0.5, 0.0]], [[0.0, 0.0]] * 2]
        rows = scaled(torch.tensor([[[1.0], [3.0]], [[5.0], [5.0]]]), valid)
        assert rows.tolist() == [[[0.0], [1.0]], [[0.0], [0.0]]]


class TestCoordinates:
    def test_on_a_grid(self) -> None:
        layout = Layout.of([Image(0, 0, range(6), (2, 3))], torch.ones(1, 7) > 0)
        places, centre = coordinates(layout)
        assert places[0].tolist() == [[i, j] for i in range(2) for j in range(3)]
        assert centre.tolist() == [[0.5, 1.0]]

    def test_tiles_share_the_whole_image(self) -> None:
        """2 x 2 patches; one row of two tiles beside the whole image, one patch left out."""
        slots = (0, 1, 2, 3, 4, 5, 8, 9, -1, 6, 7, 10, -1)
        tiling = Tiling(3, (1, 2), 4, slots)
        layout = Layout.of([tiling.image(0, 0, range(13))], torch.ones(1, 14) > 0)
        places, centre = coordinates(layout)
        assert centre.tolist() == [[0.5, 0.5]]
        assert places[0, :4].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
        columns = [-0.25, 0.25, 0.75, 1.25]
        tiles = [[0, x] for x in columns] + [[1, x] for x in columns[:3]]
        assert places[0, 4:].tolist() == tiles

    @pytest.mark.parametrize(
        "image", [Image(0, 0, range(6)), Tiling(1, None, 6, tuple(range(6))).image(0, 0, range(6))]
    )
    def test_without_a_grid_all_lie_at_one_place(self, image: Image) -> None:
        places, centre = coordinates(Layout.of([image], torch.ones(1, 7) > 0))
        assert not places.any()
        assert not centre.any()


def test_without_a_grid_the_states_alone_count() -> None:
    seen = view([(2, 3)])
    lost = replace(seen, layout=Layout.of([Image(0, 0, range(1, 7))], torch.ones(1, 8) > 0))
    far = pore.TopV(3, spatial=9.0, central=9.0)
    assert torch.equal(
        far._select(lost).keep, pore.TopV(3, spatial=0.0, central=0.0)._select(seen).keep
    )
    assert not torch.equal(far._select(lost).keep, far._select(seen).keep)


@given(st.integers(0, 2**20), st.integers(1, 40), st.floats(0, 1))
def test_evenly_marks_so_many_at_even_distances(seed: int, width: int, share: float) -> None:
    among = torch.rand(2, width, generator=torch.Generator().manual_seed(seed)) < 0.7
    counts = (among.sum(-1) * share).long()
    marked = evenly(among, counts)
    assert marked.sum(-1).tolist() == counts.tolist()
    assert not (marked & ~among).any()
    for row, ok, count in zip(marked, among, counts.tolist(), strict=True):
        if count > 1:
            gaps = row[ok].nonzero()[:, 0].diff()
            assert int(gaps.max() - gaps.min()) <= 1


def test_sources_are_the_states_that_enter_the_layer_before() -> None:
    model, inputs = tiny_llava(), batch([prompt(3, 1, 5), prompt(2, 1, 4, 1)])
    found: list[tuple[Tensor, Tensor]] = []

    class Spy(pore.TopV):
        def _select(self, view: View) -> Any:
            found.append((view.memory["states"], view.features))
            return super()._select(view)

    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states
        for layer in (1, 2, 4):
            with Spy(5, layer=layer)(model) as run:
                model(**inputs)
            source, target = found[-1]
            # Padding on the left: the second prompt is two tokens shorter.
            for row, start in enumerate((3, 4)):
                image = slice(start, start + N)
                torch.testing.assert_close(source[row], hidden[layer - 1][row, image])
                torch.testing.assert_close(target[row], hidden[layer][row, image])
            assert run.report.samples[0].tokens == (24,) * layer + (13,) * (5 - layer)


def test_after_another_method() -> None:
    """The noted states are of the tokens that are left, and places those that they had."""
    model = tiny_llava()
    for before in (pore.FasterVLM(9), pore.FastV(9, layer=1)):
        with torch.no_grad(), pore.Chain(before, pore.TopV(4, layer=3))(model) as run:
            model(**batch([prompt(3, 1, 5), prompt(2, 2, 4, 1)]))
        for sample in run.report:
            for image in sample.images:
                assert len(image.kept) == 4
                assert image.grid == (SIDE, SIDE)
                assert set(image.kept) <= set(image.stages[0][1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "at least 1"),
        ({"feature": -1.0}, "feature is a weight"),
        ({"central": float("inf")}, "central is a weight"),
        ({"sigma": 0.0}, "sigma must be above 0"),
        ({"epsilon": float("nan")}, "epsilon must be above 0"),
        ({"iterations": 0}, "whole number"),
        ({"iterations": 2.0}, "whole number"),
        ({"marginals": "mass"}, "'norm' or 'uniform'"),
        ({"recover": 1.5}, "share from 0 to 1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((BudgetError, ScoreError), match=message):
        pore.TopV(**{"keep": 5, **settings})


def test_a_state_of_zeros_can_be_ranked() -> None:
    seen = view([(3, 3)])
    seen.hidden_states[0, 3] = 0.0
    seen.memory["states"][0, 5] = 0.0
    assert int(pore.TopV(4)._select(seen).keep.sum()) == 4


def test_states_that_are_no_numbers_are_refused() -> None:
    seen = view([(3, 3)])
    seen.hidden_states[0, 3] = torch.nan
    with pytest.raises(ScoreError, match="NaN"):
        pore.TopV(4)._select(seen)
