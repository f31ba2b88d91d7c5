"""Differences between settings on scores of any make, and on the mean over benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pore.errors import InputError
from pore.evaluation.made_of import MadeOf, compared, mean_compared, relative_interval
from pore.evaluation.statistics import paired
from pore.evaluation.units import Units

MEAN = Units.of_scores([1.0] * 40)


def of_scores(first: Any, second: Any, **more: Any) -> MadeOf:
    whole = Units.of_scores([1.0] * len(first))
    return MadeOf(Units.of_scores(first), Units.of_scores(second), whole, **more)


def f1(said: str, right: str) -> Units:
    """POPE's units: what was said and what is right, a letter for every question."""
    both = [one == other == "y" for one, other in zip(said, right, strict=True)]
    wrong = [one != other for one, other in zip(said, right, strict=True)]
    below = tuple(2.0 * b + w for b, w in zip(both, wrong, strict=True))
    return Units(tuple(2.0 * b for b in both), below, ("",) * len(both))


unit = st.tuples(
    st.sampled_from((0.0, 1.0, 2.0)), st.sampled_from((0.0, 1.0, 2.0)), st.sampled_from("ab")
)


@given(st.lists(st.tuples(unit, unit), min_size=1, max_size=12), st.sampled_from(("mean", "sum")))
def test_the_difference_is_that_of_the_scores(pairs: Any, together: Any) -> None:
    parts = tuple(one[2] for one, _ in pairs)
    first, second = (
        Units(tuple(u[0] for u in side), tuple(u[1] for u in side), parts, together)
        for side in zip(*pairs, strict=True)
    )
    made = MadeOf(first, second, first, 50.0)
    assert made.scores() == pytest.approx((first.value, second.value, first.value))
    found = compared(made)
    assert found.difference == pytest.approx(50 * (second.value - first.value))
    assert found.n == len(pairs)
    assert 0 < found.p <= 1
    back = compared(MadeOf(second, first, first, 50.0))
    assert (back.gained, back.lost) == (found.lost, found.gained)
    assert back.difference == pytest.approx(-found.difference)


def test_shares_of_right_answers_are_tested_exactly() -> None:
    first, second = [1.0, 0.0, 1.0, 0.0] * 10, [1.0, 1.0, 1.0, 0.0] * 9 + [0.0, 1.0, 1.0, 0.0]
    found, exact = compared(of_scores(first, second)), paired(first, second)
    assert (found.p, found.gained, found.lost) == (exact.p, exact.gained, exact.lost)
    assert found.difference == 100 * exact.difference
    assert found.ci == tuple(100 * end for end in exact.ci)


def test_scores_between_are_tested_as_question_by_question() -> None:
    rng = np.random.default_rng(1)
    first = rng.choice([0.0, 0.3, 0.6, 1.0], 200)
    second = np.clip(first + rng.choice([0.0, 0.0, 0.3, -0.3, 0.3], 200), 0, 1)
    found, exact = compared(of_scores(first, second, scale=1.0)), paired(first, second)
    assert found.difference == pytest.approx(exact.difference)
    assert found.ci == pytest.approx(exact.ci, abs=0.005)
    assert found.p == pytest.approx(exact.p, abs=0.01)


def test_f1_is_tested_by_swapping_answers() -> None:
    right = "yn" * 60
    careful = "yn" * 50 + "nn" * 10
    always_no = "nn" * 60
    found = compared(MadeOf(f1(careful, right), f1(always_no, right), f1(right, right)))
    assert found.difference == pytest.approx(-100 * 2 * 50 / (2 * 50 + 10))
    assert found.lost == 50
    assert found.p < 0.001
    assert found.ci[1] < 0
    same = compared(MadeOf(f1(careful, right), f1(careful, right), f1(right, right)))
    assert (same.difference, same.p, same.ci) == (0, 1, (0, 0))


def test_the_mean_over_benchmarks() -> None:
    better = of_scores([1.0, 0.0] * 20, [1.0, 1.0] * 20)
    worse = of_scores([1.0, 1.0] * 20, [1.0, 0.0] * 20)
    up, none = mean_compared([better]), mean_compared([better, worse])
    assert up.difference == 0.5
    assert up.ci[0] > 0
    assert up.p < 0.001
    assert none.difference == 0
    assert none.ci[0] < 0 < none.ci[1]
    assert none.p > 0.9
    assert (none.n, none.gained, none.lost) == (80, 20, 20)


@pytest.mark.slow
def test_chance_makes_few_differences_clear() -> None:
    """Where there is no difference, p is below 0.05 in about a twentieth of the comparisons."""
    rng = np.random.default_rng(2)
    right = "".join(rng.choice(list("yn"), 60))
    ps = []
    for _ in range(60):
        one, other = ("".join(rng.choice(list("yn"), 60)) for _ in range(2))
        ps.append(compared(MadeOf(f1(one, right), f1(other, right), f1(right, right))).p)
    assert sum(p < 0.05 for p in ps) <= 8


def test_relative_interval_by_its_definition() -> None:
    first = Units.of_scores([1, 0, 1, 0, 0.5, 1, 1, 0] * 5)
    second = Units.of_scores([1, 1, 1, 0, 1, 1, 0.5, 1] * 5)
    assert relative_interval([MadeOf(second, second, second)]) == (1.0, 1.0)
    one = MadeOf(first, first, second)
    low, high = relative_interval([one, one])
    alone = relative_interval([one])
    assert alone[0] < low < first.value / second.value < high < alone[1]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match="other questions"):
        MadeOf(MEAN, Units.of_scores([1.0]), MEAN)
    nothing = MadeOf(MEAN, MEAN, Units.of_scores([0.0] * 40))
    with pytest.raises(InputError, match="unpruned model scores 0"):
        mean_compared([nothing])
