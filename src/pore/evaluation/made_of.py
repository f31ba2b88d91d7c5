"""Two settings compared on what benchmarks' scores are made of, and on the mean over benchmarks.

Units that are alike under both settings are counted together, so that a resample is one draw of
counts: ten thousand take a second, whatever the number of questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from pore.errors import InputError
from pore.evaluation.statistics import Paired, paired
from pore.evaluation.units import Units

_RESAMPLES = 10_000
_AT_ONCE = 2_000_000
"""Counts that are drawn together, which take 16 MB."""

Numbers = np.ndarray[Any, Any]
_Sides = tuple[Numbers, Numbers, Numbers]


@dataclass(frozen=True)
class MadeOf:
    """What a benchmark's score is made of under two settings and under the unpruned model.

    Attributes:
        first: The units under a setting.
        second: The same units under another one.
        unpruned: The same under the unpruned model.
        scale: What the score is multiplied by to be in the unit in which it is published.
    """

    first: Units
    second: Units
    unpruned: Units
    scale: float = 100.0

    @classmethod
    def of(cls, made: Sequence[Units | Sequence[float | None]], scale: float) -> MadeOf:
        """What scores are made of: units, or scores of questions, of which those all three have.

        Args:
            made: For the first setting, the second and the unpruned model: units each, or a score
                for every question, None where it was skipped.
            scale: As `scale`.
        """
        units = [one for one in made if isinstance(one, Units)]
        if units and len(units) < len(made):
            raise InputError("These scores are made of other things, and cannot be compared.")
        if not units:
            questions = zip(*made, strict=True)
            kept = [scores for scores in questions if None not in scores]
            units = [Units.of_scores([scores[i] for scores in kept]) for i in range(len(made))]
        one, other, whole = units
        return cls(one, other, whole, scale)

    def __post_init__(self) -> None:
        if not self.first.parts == self.second.parts == self.unpruned.parts:
            raise InputError("These scores are made of other questions, and cannot be compared.")

    @property
    def better(self) -> Numbers:
        """For every unit 1 where the second setting does better, -1 where the first does, or 0."""
        one, other = (_worth(units) for units in (self.first, self.second))
        signs: Numbers = (other > one).astype(int) - (other < one).astype(int)
        return signs

    @cached_property
    def _alike(self) -> _Sides:
        """The different units, how often each occurs, and the number of its part."""
        sides = (self.first, self.second, self.unpruned)
        _, parts = np.unique(np.asarray(self.first.parts), return_inverse=True)
        columns = [parts, *(np.asarray(n, float) for s in sides for n in (s.above, s.below))]
        rows, counts = np.unique(np.stack(columns, axis=1), axis=0, return_counts=True)
        return rows[:, 1:], counts, rows[:, 0].astype(int)

    def scores(self) -> tuple[float, float, float]:
        """The scores of the first setting, of the second and of the unpruned model."""
        counts = self._alike[1][None]
        one, other, whole = self._of(counts, 0 * counts)
        return float(one[0]), float(other[0]), float(whole[0])

    def drawn(self, rng: np.random.Generator) -> Iterator[_Sides]:
        """The three scores of units drawn with replacement within each part, some at a time."""
        _, counts, parts = self._alike
        for some in _chunks(len(counts)):
            found = np.empty((some, len(counts)), int)
            for part in np.unique(parts):
                own = counts[parts == part]
                found[:, parts == part] = rng.multinomial(own.sum(), own / own.sum(), size=some)
            yield self._of(found, 0 * found)

    def swapped(self, rng: np.random.Generator) -> Iterator[_Sides]:
        """The three scores with the two settings swapped in units at random, some at a time."""
        counts = self._alike[1]
        for some in _chunks(len(counts)):
            yield self._of(counts[None], rng.binomial(counts, 0.5, size=(some, len(counts))))

    def _of(self, counts: Numbers, swapped: Numbers) -> _Sides:
        """The scores of units that occur so often, and that are swapped so often."""
        rows, _, parts = self._alike
        one, other, whole = (rows[:, i : i + 2] for i in (0, 2, 4))
        stay = counts - swapped
        return (
            self._score(stay[..., None] * one + swapped[..., None] * other, parts),
            self._score(stay[..., None] * other + swapped[..., None] * one, parts),
            self._score(counts[..., None] * whole, parts),
        )

    def _score(self, sums: Numbers, parts: Numbers) -> Numbers:
        """The score from what the different units add above the line and below."""
        by_part = np.stack([sums[:, parts == part].sum(1) for part in np.unique(parts)], axis=1)
        above, below = by_part[..., 0], by_part[..., 1]
        shares = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
        scores: Numbers = shares.mean(1) if self.first.together == "mean" else shares.sum(1)
        return scores


def compared(benchmark: MadeOf, *, seed: int = 0) -> Paired:
    """Compare two settings on a benchmark, in the unit in which its score is published.

    Args:
        benchmark: What the score is made of.
        seed: Seed of the bootstrap and of the permutation test.

    Returns:
        The second minus the first, with the exact McNemar test where the score is the share of
        questions that were answered right, and otherwise a test that swaps the two settings in
        units (questions, or images with several questions) at random.
    """
    one, other = benchmark.first, benchmark.second
    plain = {*one.below, *other.below} == {1.0} and len(set(one.parts)) == 1
    if plain and {*one.above, *other.above} <= {0.0, 1.0}:
        found = paired(one.above, other.above, seed=seed)
        low, high = (benchmark.scale * end for end in found.ci)
        return replace(found, difference=benchmark.scale * found.difference, ci=(low, high))
    return _found([benchmark], lambda one, other, _: benchmark.scale * (other - one), seed)


def mean_compared(benchmarks: Sequence[MadeOf], *, seed: int = 0) -> Paired:
    """Compare two settings on the mean, over benchmarks, of the score relative to the unpruned one.

    Args:
        benchmarks: What every benchmark's score is made of.
        seed: Seed of the bootstrap and of the permutation test.

    Returns:
        The second minus the first, as a share of the unpruned model's score. The bootstrap draws
        the units of every benchmark, with what all three made of a unit together; the test swaps
        the two settings in units at random.

    Raises:
        InputError: The unpruned model scores 0 on one of them.
    """
    if any(one.scores()[2] == 0 for one in benchmarks):
        raise InputError("The unpruned model scores 0 on a benchmark: nothing is relative to it.")
    return _found(benchmarks, lambda one, other, whole: (other - one) / whole, seed)


def relative_interval(benchmarks: Sequence[MadeOf]) -> tuple[float, float]:
    """The 95 % interval of the mean, over benchmarks, of a score relative to the unpruned model's.

    Args:
        benchmarks: What every benchmark's score is made of, the setting as the second.

    Returns:
        Its lower and upper end, from a bootstrap as in `mean_compared`.
    """
    rng, drawn = np.random.default_rng(0), np.zeros(_RESAMPLES)
    for one in benchmarks:
        shares = [second / np.maximum(whole, 1e-12) for _, second, whole in one.drawn(rng)]
        drawn += np.concatenate(shares) / len(benchmarks)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def _found(benchmarks: Sequence[MadeOf], change: Any, seed: int) -> Paired:
    """The mean of a change over benchmarks, with its interval and its test."""
    rng = np.random.default_rng(seed)
    drawn, swapped = np.zeros(_RESAMPLES), np.zeros(_RESAMPLES)
    difference, better = 0.0, np.concatenate([one.better for one in benchmarks])
    for one in benchmarks:
        first, second, whole = one.scores()
        difference += change(first, second, whole) / len(benchmarks)
        for found, draws in ((drawn, one.drawn(rng)), (swapped, one.swapped(rng))):
            changes = [change(a, b, np.maximum(c, 1e-12)) for a, b, c in draws]
            found += np.concatenate(changes) / len(benchmarks)
    low, high = np.quantile(drawn, (0.025, 0.975))
    # Sums of the same numbers in another order differ by rounding.
    near = abs(difference) * (1 - 1e-9) - 1e-12
    p = float((np.count_nonzero(np.abs(swapped) >= near) + 1) / (_RESAMPLES + 1))
    gained, lost = int((better > 0).sum()), int((better < 0).sum())
    return Paired(len(better), gained, lost, float(difference), (float(low), float(high)), p)


def _worth(units: Units) -> Numbers:
    """What units are worth: one that adds nothing below the line takes nothing from the score."""
    above, below = np.asarray(units.above, float), np.asarray(units.below, float)
    worth: Numbers = np.divide(above, below, out=np.full_like(above, np.inf), where=below > 0)
    return worth


def _chunks(width: int) -> Iterator[int]:
    """Parts of the resamples, so that counts of this width fit into memory."""
    size = max(_AT_ONCE // width, 1)
    for begin in range(0, _RESAMPLES, size):
        yield min(size, _RESAMPLES - begin)
