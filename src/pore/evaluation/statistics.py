"""How certain a share is, and a difference of two shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pore.errors import InputError

CLEAR = 0.05
"""A difference is called clear where p is below this."""

# Questions from which on a bootstrap of 10,000 resamples takes seconds.
_MANY = 20_000


@lru_cache(maxsize=4096)  # records are written again after every setting
def wilson(right: int, n: int) -> tuple[float, float]:
    """The Wilson score interval of a share, at 95 %.

    Args:
        right: Successes.
        n: Trials, at least 1.

    Returns:
        Its lower and upper end, within [0, 1].

    Raises:
        InputError: `right` is not from 0 to `n`, or there were no trials.
    """
    if n < 1 or not 0 <= right <= n:
        raise InputError(f"A share of {right} in {n} has no confidence interval.")
    from scipy.stats import binomtest

    interval = binomtest(right, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Paired:
    """How two methods differ on the same questions.

    Attributes:
        n: Questions that both answered.
        gained: Questions on which the second scores higher.
        lost: Questions on which the first scores higher.
        difference: Mean score of the second minus that of the first. Where an answer is right or
            wrong, the score is 1 or 0, and the mean the accuracy.
        ci: 95 % interval of the difference, from a paired bootstrap.
        p: Two-sided test of no difference: the exact McNemar test where every score is 0 or 1, and
            otherwise a permutation test.
    """

    n: int
    gained: int
    lost: int
    difference: float
    ci: tuple[float, float]
    p: float

    @property
    def clear(self) -> bool:
        """Whether chance alone is an unlikely cause: p below 0.05.

        If few questions differ, trust the exact test rather than the interval.
        """
        return self.p < CLEAR

    def record(self) -> dict[str, Any]:
        """The comparison as plain JSON types."""
        return {
            "n": self.n,
            "difference": self.difference,
            "ci": list(self.ci),
            "won": self.gained,
            "lost": self.lost,
            "p": self.p,
        }


@dataclass(frozen=True)
class Judged:
    """A comparison as one of several.

    Attributes:
        paired: It.
        p_holm: p, corrected for the number of comparisons.
    """

    paired: Paired
    p_holm: float

    @property
    def real(self) -> bool:
        """Whether chance alone is an unlikely cause, all comparisons considered."""
        return self.p_holm < CLEAR

    def record(self) -> dict[str, Any]:
        """It as plain JSON types."""
        return {**self.paired.record(), "p_holm": self.p_holm, "real": self.real}


def paired(
    first: Sequence[float], second: Sequence[float], *, seed: int = 0, resamples: int = 10_000
) -> Paired:
    """Compare two methods question by question.

    The bootstrap draws questions with replacement. If answers are right or wrong, a question is
    won, lost or neither, so a resample is one multinomial draw of those three counts. Otherwise,
    as with the soft scores of VQAv2, the test swaps the two scores of every question at random: if
    there is no difference, no swap makes one.

    Args:
        first: A score for every question; 1 or True for right, 0 or False for wrong.
        second: The same of another method, in the same order.
        seed: Seed of the bootstrap and of the permutation test.
        resamples: Resamples of each.

    Returns:
        The difference, second minus first.

    Raises:
        InputError: There are no questions, or their numbers differ.
    """
    n = len(first)
    if n < 1 or len(second) != n:
        raise InputError(f"Cannot pair {n} questions with {len(second)}.")
    by = np.asarray(second, float) - np.asarray(first, float)
    gained, lost = int((by > 0).sum()), int((by < 0).sum())
    rng = np.random.default_rng(seed)
    if {*first, *second} <= {0, 1}:
        shares = (gained / n, lost / n, (n - gained - lost) / n)
        draws = rng.multinomial(n, shares, size=resamples)
        drawn = (draws[:, 0] - draws[:, 1]) / n
        difference, p = (gained - lost) / n, _mcnemar(gained, lost)
    else:
        drawn = np.array([by[rng.integers(0, n, n)].mean() for _ in range(resamples)])
        difference, p = float(by.mean()), _swapped(by, rng, resamples)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Paired(n, gained, lost, difference, (float(low), float(high)), p)


def score_interval(scores: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean score.

    Args:
        scores: One for every question, from 0 to 1.

    Returns:
        Its lower and upper end: the Wilson interval where every score is 0 or 1, and otherwise that
        of a bootstrap over the questions.
    """
    if set(scores) <= {0, 1}:
        return wilson(int(sum(scores)), len(scores))
    values, rng = np.asarray(scores, float), np.random.default_rng(0)
    n, resamples = len(values), 1000 if len(values) > _MANY else 10_000
    means = [values[rng.integers(0, n, n)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def holm(ps: Sequence[float]) -> list[float]:
    """Correct p-values for their number, by Holm's method.

    The smallest is multiplied by the number of tests, the next by one less, and so on; none becomes
    smaller than one before it. With every corrected p below 0.05 taken for real, the chance that
    even one of the differences is not stays below 5 %, however the tests depend on each other.

    Args:
        ps: The p-values of all tests that were made.

    Returns:
        The corrected ones, in the same order.
    """
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = largest
    return corrected


def _mcnemar(gained: int, lost: int) -> float:
    """Probability of a split at least as uneven, were both sides equally likely."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained or lost else 1.0


def _swapped(by: np.ndarray[Any, Any], rng: np.random.Generator, resamples: int) -> float:
    """Probability of a difference at least as large, were the two scores of a question swapped."""
    differ = by[by != 0]
    found = abs(differ.sum())
    signs = (rng.choice((-1.0, 1.0), len(differ)) for _ in range(resamples))
    # 1e-12: sums of the same numbers in another order differ by rounding.
    larger = sum(abs((sign * differ).sum()) >= found - 1e-12 for sign in signs)
    return float((larger + 1) / (resamples + 1))
