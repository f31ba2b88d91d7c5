"""G-Prune: the walk as written down, budgets of two graphs, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

import pore
from helpers.models import N, batch, prompt, tiny_llava
from pore.engine.stages import View
from pore.errors import BudgetError, PoreError, ScoreError
from pore.layout import Layout, Tiling
from pore.methods.gprune import arrivals, degrees, transition

sizes = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(0, 999))


def features(images: int, tokens: int, seed: int) -> Tensor:
    """(I, t, 3) embeddings, some of them near one another."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, tokens, 3, generator=generator, dtype=torch.float64)


def scores(states: Tensor, valid: Tensor | None = None, iterations: int = 5) -> Tensor:
    if valid is None:
        valid = torch.ones(states.shape[:2], dtype=torch.bool)
    links = transition(states, valid, 0.5, 0.03)
    return arrivals(states, links, valid, iterations)


@given(sizes, st.integers(1, 6))
def test_the_walk_as_the_paper_has_it(size: tuple[int, int, int], iterations: int) -> None:
    states = features(*size)
    got = scores(states, iterations=iterations)
    for one, found in zip(states, got, strict=True):
        unit = normalize(one, dim=-1)
        weights = []
        for row in (unit @ unit.T).tolist():
            kept = [torch.tensor(c / 0.03).exp() if c >= 0.5 else torch.tensor(0.0) for c in row]
            weights.append(torch.stack(kept) / torch.stack(kept).sum())
        power = torch.linalg.matrix_power(torch.stack(weights).double(), iterations)
        mass = one.norm(dim=-1) @ power
        links = torch.tensor([int((row > 0).sum()) for row in weights])
        torch.testing.assert_close(found, mass / links, rtol=1e-5, atol=1e-8)


@given(sizes)
def test_weights_sum_to_one_and_stop_at_the_least_cosine(size: tuple[int, int, int]) -> None:
    states = features(*size)
    valid = torch.ones(states.shape[:2], dtype=torch.bool)
    links = transition(states, valid, 0.5, 0.03)
    torch.testing.assert_close(links.sum(-1), torch.ones_like(links.sum(-1)))
    cosine = normalize(states, dim=-1) @ normalize(states, dim=-1).mT
    assert torch.equal(links > 0, cosine >= 0.5)
    assert (degrees(links) >= 1).all()


@given(sizes, st.integers(0, 99))
def test_moves_with_its_tokens_and_knows_no_scale(size: tuple[int, int, int], seed: int) -> None:
    states = features(*size)
    order = torch.randperm(size[1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(scores(states[:, order] * 7), scores(states)[:, order] * 7)


@given(sizes)
def test_filling_does_not_matter(size: tuple[int, int, int]) -> None:
    states = features(*size)
    wide = torch.cat([states, states[:, :1].expand(-1, 3, -1) * 100], 1)
    wide[0, 0] = states[0, 0] = 0.0  # passes on to all alike, filling left out
    valid = torch.arange(wide.shape[1]).expand(len(wide), -1) < size[1]
    torch.testing.assert_close(scores(wide, valid)[:, : size[1]], scores(states))


def test_what_is_alone_keeps_what_it_has() -> None:
    states = torch.tensor([[[5.0, 0, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0]]])
    got = scores(states)
    torch.testing.assert_close(got, torch.tensor([[5.0, 1 / 3, 1 / 3, 1 / 3]]))


class TestTiles:
    """A whole image of 9 patches and a grid of two tiles, of which 5 patches show padding alone."""

    tiling = Tiling(3, (1, 2), 9, (*range(9), *range(9, 14), -1, *range(18, 26), -1))

    def view(self, seed: int = 0) -> View:
        image = self.tiling.image(0, 0, range(2, 2 + len(self.tiling.slots)))
        length = len(self.tiling.slots) + 5
        layout = Layout.of([image], torch.ones(1, length, dtype=torch.bool))
        generator = torch.Generator().manual_seed(seed)
        states = torch.randn(1, length, 4, generator=generator)
        return View(layout, states, None, None, generator, lambda x: x)

    def kept(self, view: View, pruner: pore.GPrune) -> tuple[list[int], list[int]]:
        """What stays of the whole image and of the grid."""
        kept = pruner._select(view).keep[0].nonzero().flatten().tolist()
        return [i for i in kept if i < 9], [i for i in kept if i >= 9]

    def test_the_two_graphs_are_two_problems(self) -> None:
        view = self.view()
        base, grid = self.kept(view, pore.GPrune(keep=10))
        assert (len(base), len(grid)) == (4, 6)  # of 9 and 13
        for first, last, found in ((0, 9, base), (9, 22, grid)):
            alone = scores(view.features[:, first:last])[0]
            best = alone.argsort(descending=True)[: len(found)] + first
            assert best.sort().values.tolist() == found

    def test_the_authors_round_down_in_each(self) -> None:
        view = self.view()
        exact = self.kept(view, pore.GPrune(keep=0.5))
        theirs = self.kept(view, pore.GPrune(keep=0.5, faithful=True))
        assert [len(part) for part in exact] == [5, 6]
        assert [len(part) for part in theirs] == [4, 6]
        assert set(theirs[0]) < set(exact[0])
        number = pore.GPrune(keep=10, faithful=True)
        assert self.kept(view, number) == self.kept(view, pore.GPrune(keep=10))
        with pytest.raises(BudgetError, match="rounds down to no token"):
            self.kept(view, pore.GPrune(keep=0.05, faithful=True))


def test_positions_stay_and_several_images_are_apart() -> None:
    model, inputs = tiny_llava(), batch([prompt(3, 2, 5), prompt(2, 1, 4, 1)])
    positions: list[Tensor] = []
    hook = model.model.language_model.layers[1].register_forward_pre_hook(
        lambda _, __, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    with torch.no_grad(), pore.GPrune(keep=3)(model) as run:
        model(**inputs)
    hook.remove()
    first, second = (image.kept for image in run.report.samples[0].images)
    text = [0, 1, 2, 19, 20, 37, 38, 39, 40, 41]
    expected = sorted([*text, *(3 + i for i in first), *(21 + i for i in second)])
    assert positions[0][0].tolist() == expected
    assert [len(image.kept) for s in run.report for image in s.images] == [3, 3, 3]
    after = pore.Chain(pore.DivPrune(keep=4), pore.GPrune(keep=5))
    with torch.no_grad(), after(model), pytest.raises(BudgetError, match="only 4 remain"):
        model(**inputs)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"similarity": 0.0}, ScoreError),
        ({"similarity": 1.5}, ScoreError),
        ({"temperature": 0.0}, ScoreError),
        ({"temperature": float("nan")}, ScoreError),
        ({"iterations": 0}, ScoreError),
        ({"keep": 1.5}, BudgetError),
        ({"keep": N + 1}, BudgetError),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], error: type[PoreError]) -> None:
    def run() -> None:
        model = tiny_llava()
        with pore.GPrune(**settings)(model):
            model(**batch([prompt(3, 1, 5)]))

    with pytest.raises(error):
        run()
