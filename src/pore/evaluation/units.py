"""What a benchmark's score is added up from, and how certain the score is.

Every score of a benchmark is made of units that were drawn: questions, or images with several
questions about them. A bootstrap draws them anew. A unit brings two numbers, and a part of the
benchmark, such as a category of MME, has the sum of the first over the sum of the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

Together = Literal["mean", "sum"]
"""What the parts of a benchmark make: their mean, as in POPE, or their sum, as in MME."""

# Units from which on a bootstrap of 10,000 resamples takes many seconds.
_MANY = 5000


@dataclass(frozen=True)
class Units:
    """The units of a benchmark under one setting.

    Attributes:
        above: (n,) what each unit adds above the line.
        below: (n,) what it adds below.
        parts: (n,) the part that it belongs to.
        together: What the parts make.
    """

    above: tuple[float, ...]
    below: tuple[float, ...]
    parts: tuple[str, ...]
    together: Together = "mean"

    @classmethod
    def of_scores(cls, scores: Sequence[float]) -> Units:
        """Questions whose mean score counts."""
        n = len(scores)
        return cls(tuple(scores), (1.0,) * n, ("",) * n)

    @classmethod
    def read(cls, record: Mapping[str, Any] | None) -> Units | None:
        """Units as `record` gave them; None for none."""
        if record is None:
            return None
        above, below, parts = (tuple(record[name]) for name in ("above", "below", "parts"))
        return cls(above, below, parts, record["together"])

    def record(self) -> dict[str, Any]:
        """The units as plain JSON types."""
        return {
            "above": list(self.above),
            "below": list(self.below),
            "parts": list(self.parts),
            "together": self.together,
        }

    @property
    def value(self) -> float:
        """The score."""
        return self.drawn([range(len(own)) for own in self.places])

    @cached_property
    def places(self) -> list[np.ndarray[Any, Any]]:
        """The places of the units of every part."""
        names = np.asarray(self.parts)
        return [np.flatnonzero(names == name) for name in dict.fromkeys(self.parts)]

    def draw(self, rng: np.random.Generator) -> list[Any]:
        """Of every part as many of its units as it has, with replacement."""
        return [rng.integers(0, len(own), len(own)) for own in self.places]

    def drawn(self, chosen: Sequence[Any]) -> float:
        """The score of units that were drawn.

        Args:
            chosen: For every part which of its units, some of them several times.
        """
        found = []
        for above, below, own in zip(*self._numbers, chosen, strict=True):
            under = below[own].sum()
            found.append(above[own].sum() / under if under else 0.0)
        return float(sum(found) / (len(found) if self.together == "mean" else 1))

    @cached_property
    def _numbers(self) -> tuple[list[Any], list[Any]]:
        """The numbers of every part: above the line, and below."""
        both = (np.asarray(self.above, float), np.asarray(self.below, float))
        above, below = ([numbers[own] for own in self.places] for numbers in both)
        return above, below

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the score, from a bootstrap that draws within the parts."""
        rng = np.random.default_rng(0)
        resamples = 1000 if len(self.above) > _MANY else 10_000
        values = [self.drawn(self.draw(rng)) for _ in range(resamples)]
        low, high = np.quantile(values, (0.025, 0.975))
        return float(low), float(high)
