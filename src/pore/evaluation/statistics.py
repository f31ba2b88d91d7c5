"""How certain a share is, and a difference of two shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pore.errors import InputError


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
        gained: Questions that the second has right and the first wrong.
        lost: Questions that the first has right and the second wrong.
        ci: 95 % interval of the difference in accuracy, from a paired bootstrap.
        p: Two-sided exact McNemar test of no difference.
    """

    n: int
    gained: int
    lost: int
    ci: tuple[float, float]
    p: float

    @property
    def difference(self) -> float:
        """Accuracy of the second minus accuracy of the first."""
        return (self.gained - self.lost) / self.n

    @property
    def clear(self) -> bool:
        """Whether chance alone is an unlikely cause: p below 0.05.

        If few questions differ, trust the exact test rather than the interval.
        """
        return self.p < 0.05


def paired(
    first: Sequence[bool], second: Sequence[bool], *, seed: int = 0, resamples: int = 10_000
) -> Paired:
    """Compare two methods question by question.

    The bootstrap draws questions with replacement. A question is won, lost or neither, so a
    resample is one multinomial draw of those three counts.

    Args:
        first: Right or wrong, one per question.
        second: The same of another method, in the same order.
        seed: Seed of the bootstrap.
        resamples: Resamples of the bootstrap.

    Returns:
        The difference, second minus first.

    Raises:
        InputError: There are no questions, or their numbers differ.
    """
    n = len(first)
    if n < 1 or len(second) != n:
        raise InputError(f"Cannot pair {n} questions with {len(second)}.")
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    rng = np.random.default_rng(seed)
    shares = (gained / n, lost / n, (n - gained - lost) / n)
    draws = rng.multinomial(n, shares, size=resamples)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, (0.025, 0.975))
    return Paired(n, gained, lost, (float(low), float(high)), _mcnemar(gained, lost))


def _mcnemar(gained: int, lost: int) -> float:
    """Probability of a split at least as uneven, were both sides equally likely."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained or lost else 1.0
