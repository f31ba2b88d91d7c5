"""Typical images, drawn from sums, to see what dividing by P does to the tokens that are kept.

Sums keep no image, so that what would be kept of each is not known. They do keep the mean of the
attention on every position and its standard deviation over images. Images are drawn that have both:
the attention of every position is log-normal and independent of that of all others. In real images
neighbours go together; on the embedded model the shares below come out 0 to 5 points lower from
drawn images than from the images measured (docs/calibrating.md).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pore.bias.fitting import Floats
from pore.tensors.selection import budget

_DRAWS, _SEED = 200, 0


PARTS = 3
"""The parts that an image is divided into, in reading order."""


class Tokens(NamedTuple):
    """The visual tokens of an image, and what attention they get over many images.

    Attributes:
        mean: (N,) the mean.
        spread: (N,) the standard deviation.
        part: (N,) which third of the image each is in: 0, 1 or 2.
    """

    mean: Floats
    spread: Floats
    part: np.ndarray


class Typical:
    """Typical images, and what is kept of them."""

    def __init__(self, tokens: Tokens, keep: int | float) -> None:
        """Draw the images.

        Args:
            tokens: What they are made from.
            keep: How many tokens are kept, or which share of them.

        Raises:
            BudgetError: `keep` is not a budget for an image with this number of tokens.
        """
        self._part = tokens.part
        self._count = budget(keep, len(tokens.mean))
        seen = tokens.mean > 0
        mean = np.where(seen, tokens.mean, 1.0)
        variance = np.log1p((tokens.spread / mean) ** 2)
        normal = np.random.default_rng(_SEED).standard_normal((_DRAWS, len(mean)))
        drawn = mean * np.exp(np.sqrt(variance) * normal - variance / 2)
        self._attention = np.where(seen, drawn, 0.0)

    def kept(self, curve: Floats | None = None) -> np.ndarray:
        """What is kept of every image when its attention is divided by a curve.

        Args:
            curve: (N,) P; None for no division.

        Returns:
            (images, N) True where a token is kept.
        """
        scores = self._attention if curve is None else self._attention / curve
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self._count]
        mask = np.zeros(scores.shape, dtype=bool)
        np.put_along_axis(mask, best, True, axis=1)
        return mask

    def apart(self, one: np.ndarray, other: np.ndarray) -> float:
        """The share of what is kept that two choices do not have in common."""
        return 1 - float((one & other).sum(1).mean()) / self._count

    def parts(self, kept: np.ndarray) -> tuple[float, float, float]:
        """The share of what is kept that lies in each third of the image."""
        total = np.bincount(self._part, kept.sum(0), minlength=PARTS) / kept.sum()
        first, middle, last = total.tolist()
        return first, middle, last
