"""Whether an answer is right, and how sure shares are, against their definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pore.errors import InputError
from pore.evaluation.answers import is_right, normalise
from pore.evaluation.statistics import holm, paired, score_interval, wilson


@pytest.mark.parametrize(
    ("given", "expected", "right"),
    [
        ("Red", "red", True),
        ("  red.\n", "red", True),
        ("“yes”", "yes", False),  # only the quotes of a keyboard are taken off
        ('"yes"', "yes", True),
        ("top  left", "top left", True),
        ("\uff12", "2", True),
        ("two", "2", False),
        ("a cat", "cat", False),
        ("", "red", False),
        ("3.5", "35", False),
    ],
)
def test_exact_match(given: str, expected: str, right: bool) -> None:
    assert is_right(given, expected) is right
    assert normalise(normalise(given)) == normalise(given)


@pytest.mark.parametrize(("right", "n"), [(0, 9), (9, 9), (1, 1), (37, 50), (940, 1000)])
def test_wilson(right: int, n: int) -> None:
    share, z = right / n, 1.959963984540054
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = wilson(right, n)
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-12)
    assert low >= 0.0
    assert high <= 1.0


@pytest.mark.parametrize(("right", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_of_nothing(right: int, n: int) -> None:
    with pytest.raises(InputError, match="no confidence interval"):
        wilson(right, n)


def test_paired_against_its_definition() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.random(300) < 0.8, rng.random(300) < 0.86
    found = paired(first.tolist(), second.tolist(), seed=2)
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    assert (found.gained, found.lost, found.n) == (gained, lost, 300)
    assert found.difference == pytest.approx(second.mean() - first.mean())
    differ = gained + lost
    tail = sum(math.comb(differ, i) for i in range(min(gained, lost) + 1))
    assert found.p == pytest.approx(min(1.0, 2 * tail / 2**differ), abs=1e-12)
    draws = rng.integers(0, 300, (4000, 300))
    drawn = (second[draws].astype(int) - first[draws]).mean(1)
    assert found.ci == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))), abs=0.01)
    assert found == paired(first.tolist(), second.tolist(), seed=2)


def test_paired_without_any_difference() -> None:
    found = paired([True, False], [True, False])
    assert (found.difference, found.ci, found.p, found.clear) == (0.0, (0.0, 0.0), 1.0, False)


def test_paired_of_many() -> None:
    n = 5000
    found = paired([False] * n, [True] * n)
    assert found.clear
    assert found.p == pytest.approx(0.0)


def test_paired_needs_pairs() -> None:
    with pytest.raises(InputError, match="Cannot pair"):
        paired([True], [True, False])


def test_scores_between_right_and_wrong() -> None:
    """Soft scores, as of VQAv2, against a test that tries every swap."""
    first, second = [0.3, 0.6, 1, 0, 0.9, 0.3], [0.6, 0.9, 1, 0.3, 0.6, 1]
    found = paired(first, second, resamples=20_000)
    by = [b - a for a, b in zip(first, second, strict=True)]
    swaps = [
        abs(sum(sign * d for sign, d in zip(signs, by, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(by))
    ]
    exact = np.mean([swap >= abs(sum(by)) - 1e-9 for swap in swaps])
    assert found.p == pytest.approx(exact, abs=0.01)
    assert found.difference == pytest.approx(np.mean(by))
    assert (found.n, found.gained, found.lost) == (6, 4, 1)
    assert found.ci[0] < found.difference < found.ci[1]
    low, high = score_interval(second)
    assert low < np.mean(second) < high


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm(ps: list[float]) -> None:
    """Against its definition: the ordered p are rejected until the first that is too large."""
    corrected = holm(ps)
    for level in (0.01, 0.05, 0.5):
        order = sorted(range(len(ps)), key=lambda i: ps[i])
        rejected = []
        for rank, i in enumerate(order):
            if ps[i] * (len(ps) - rank) >= level:
                break
            rejected.append(i)
        assert {i for i, p in enumerate(corrected) if p < level} == set(rejected)
