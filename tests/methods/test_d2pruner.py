"""D²Pruner: pivots, an independent set, what fills up, and that it needs a bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pore
from cases import CASES
from cases.base import Case
from helpers.families import KEEP, PROMPTS, check_cached_decode, check_masked_dense
from helpers.models import N, batch, prompt, tiny_llava
from pore.bias.where import Where
from pore.cost.named import model_shape
from pore.engine.stages import View
from pore.errors import BudgetError, CalibrationError, ProfileMismatchError, ScoreError
from pore.families.registry import family_of
from pore.layout import Image, Layout

P = pore.PositionBias.exponential(0.1, N)


def view(sizes: list[tuple[int, int]], seed: int = 0) -> View:
    """One image of each size, each in a prompt of its own, with random states and attention."""
    generator = torch.Generator().manual_seed(seed)
    counts = [height * width for height, width in sizes]
    length = max(counts) + 3
    images = [Image(i, 0, range(2, 2 + n), sizes[i]) for i, n in enumerate(counts)]
    layout = Layout.of(images, torch.arange(length) < torch.tensor(counts)[:, None] + 3)
    states = torch.randn(len(counts), length, 3, generator=generator, dtype=torch.float64)
    attention = torch.rand(len(counts), max(counts), generator=generator, dtype=torch.float64)
    return View(layout, states, attention, None, generator, norm=lambda x: x)


def by_hand(
    states: Tensor, scores: list[float], keep: int, pruner: pore.D2Pruner, width: int
) -> set[int]:
    """The tokens of one image that stay, one after the other."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    first = max(1, int(keep * pruner.pivots))

    def similar(a: int, b: int) -> float:
        apart = (a // width - b // width) ** 2 + (a % width - b % width) ** 2
        cosine = float(torch.cosine_similarity(states[a], states[b], dim=0))
        near = float(torch.tensor(-apart / 2).exp())
        return pruner.semantic * cosine + (1 - pruner.semantic) * near

    found: list[int] = []
    for i in order[first:]:
        if first + len(found) == keep:
            break
        if all(similar(i, j) <= pruner.threshold for j in found):
            found.append(i)
    chosen = [*order[:first], *found]
    return {*chosen, *[i for i in order if i not in chosen][: keep - len(chosen)]}


sizes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3)


@given(
    sizes,
    st.integers(0, 2**20),
    st.floats(0.05, 1.0),
    st.floats(0, 1),
    st.floats(-0.5, 0.95),
    st.sampled_from([1.0, 0.5, 0.0]),
)
def test_is_what_its_rule_says_image_by_image(
    sizes: list[tuple[int, int]],
    seed: int,
    keep: float,
    pivots: float,
    threshold: float,
    semantic: float,
) -> None:
    seen = view(sizes, seed)
    pruner = pore.D2Pruner(keep, pivots=pivots, threshold=threshold, semantic=semantic)
    scores = seen.attention
    try:
        budgets = seen.budget(keep)
    except BudgetError:
        with pytest.raises(BudgetError, match="rounds to none"):
            pruner.choose(seen, scores)
        return
    kept = pruner.choose(seen, scores).keep
    assert not (kept & ~seen.layout.valid).any()
    for i, (height, width) in enumerate(sizes):
        n = height * width
        own, row = seen.features[i, :n], scores[i, :n].tolist()
        expected = by_hand(own, row, budgets[i], pruner, width)
        assert set(kept[i].nonzero()[:, 0].tolist()) == expected


def test_pivots_do_not_pass_over_their_like() -> None:
    """All tokens are alike: one of the others is taken, and the best fill up."""
    seen = view([(1, 10)])
    states = torch.ones_like(seen.hidden_states)
    scores = torch.arange(10.0, 0, -1)[None]
    kept = pore.D2Pruner(6, pivots=0.5).choose(replace(seen, hidden_states=states), scores).keep
    assert kept[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    states[0, 2 + 5] = torch.tensor([1.0, -1.0, 0.0])
    kept = pore.D2Pruner(5, pivots=0.6).choose(replace(seen, hidden_states=states), scores).keep
    assert kept[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 5]


def test_without_a_bias_it_is_refused() -> None:
    with (
        pytest.raises(CalibrationError, match=r'calibrate\(.*layer=3\)\.fit\("empirical"\)'),
        pore.D2Pruner(5, layer=3)(tiny_llava()),
    ):
        pass
    assert pore.D2Pruner.usual(5, model_shape("llava-64x8")) is None


def test_a_bias_of_something_else_is_refused() -> None:
    model, pruner = tiny_llava(), pore.D2Pruner(5, reweight=pore.PositionBias.exponential(0.1, 9))
    with pruner(model), pytest.raises(ProfileMismatchError, match="positions"):
        model(**batch([prompt(3, 1, 5)]))


def test_all_pivots_is_fastv_with_pore() -> None:
    model, inputs = tiny_llava(), batch([prompt(3, 1, 5), prompt(2, 2, 4, 1)])
    kept = []
    for pruner in (pore.D2Pruner(6, reweight=P, pivots=1.0), pore.FastV(6, reweight=P)):
        with torch.no_grad(), pruner(model) as run:
            model(**inputs)
        kept.append([image.kept for sample in run.report for image in sample.images])
    assert kept[0] == kept[1]


def fair(scores: Tensor, where: Where) -> Tensor:
    """A bias over any number of positions."""
    return scores / torch.exp(0.1 * where.raster)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
class TestFamilies:
    def pruner(self, case: Case) -> pore.D2Pruner:
        family = family_of(case.model())
        layers = family.layers(case.model())
        reads = next(i for i, layer in enumerate(layers) if i and not family.recurrent(layer))
        return pore.D2Pruner(KEEP, layer=reads + 1, reweight=fair)

    def test_equals_masked_dense(self, case: Case) -> None:
        for situation, side in (("ragged", "left"), ("several", "right")):
            check_masked_dense(case, self.pruner(case), PROMPTS[situation], side)

    def test_cached_decode(self, case: Case) -> None:
        check_cached_decode(case, self.pruner(case), PROMPTS["ragged"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "at least 1"),
        ({"pivots": 1.5}, "0 to 1"),
        ({"threshold": 2.0}, "from -1 to 1"),
        ({"semantic": float("nan")}, "from 0 to 1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((BudgetError, ScoreError), match=message):
        pore.D2Pruner(**{"keep": 5, **settings})


def test_scores_that_are_no_numbers_are_refused() -> None:
    seen = view([(3, 3)])
    with pytest.raises(ScoreError, match="NaN"):
        pore.D2Pruner(3).choose(seen, seen.attention / 0 * 0)
