"""How much of the objects asked about is kept, and how certain that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pore.embedded.things import THIRDS

Floats = npt.NDArray[np.floating]
Flags = npt.NDArray[np.bool_]

FRACTIONS = (72 / 144, 36 / 144, 14 / 144)
"""Shares of the visual tokens that are kept."""

_SURE = 1.96


def budgets(n: int) -> tuple[int, ...]:
    """Tokens kept of `n`: 72, 36 and 14 of 144, and the same shares of other numbers."""
    return tuple(round(f * n) for f in FRACTIONS)


def kept(scores: Floats, keep: int) -> Flags:
    """``(Q, N)`` bool: the `keep` visual tokens of the highest score, the first of equal ones."""
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :keep]
    found = np.zeros(scores.shape, bool)
    np.put_along_axis(found, order, True, axis=-1)
    return found


def shares(scores: Floats, patches: Flags, keep: int) -> Floats:
    """``(Q,)`` the share kept of the patches that show what is asked about.

    Args:
        scores: ``(Q, N)``.
        patches: ``(Q, N)`` bool: the patches asked about; the result is NaN if there are none.
        keep: Tokens kept.
    """
    with np.errstate(invalid="ignore"):
        found: Floats = (kept(scores, keep) & patches).sum(-1) / patches.sum(-1)
    return found


def in_thirds(patches: Flags) -> dict[str, Flags]:
    """Patches ``(Q, N)`` of a square grid, separated by the third of the image that they are in."""
    n = patches.shape[-1]
    side = round(n**0.5)
    third = np.arange(n) // side * 3 // side
    return {name: patches & (third == i) for i, name in enumerate(THIRDS)}


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences with half the width of its 95 % interval."""

    mean: float
    half_width: float

    @classmethod
    def between(cls, ours: Floats, theirs: Floats) -> Difference:
        """The difference of two series about the same questions."""
        paired = ours - theirs
        return cls(float(paired.mean()), float(_SURE * paired.std(ddof=1) / len(paired) ** 0.5))

    @property
    def is_harm(self) -> bool:
        """Whether the interval lies below 0."""
        return self.mean + self.half_width < 0


def result(scores: Floats, plain: Floats, patches: Flags, keep: int) -> dict[str, Any]:
    """What a correction keeps, compared with no correction, in per cent.

    Args:
        scores: ``(Q, N)`` corrected.
        plain: ``(Q, N)`` uncorrected.
        patches: ``(Q, N)`` bool: the patches asked about.
        keep: Tokens kept.
    """
    ours, theirs = (100 * shares(s, patches, keep) for s in (scores, plain))
    difference = Difference.between(ours, theirs)
    both = kept(scores, keep) & kept(plain, keep)
    return {
        "kept": round(float(ours.mean()), 2),
        "difference": round(difference.mean, 2),
        "half_width": round(difference.half_width, 2),
        "thirds": {
            name: round(float(np.nanmean(100 * shares(scores, part, keep))), 1)
            for name, part in in_thirds(patches).items()
        },
        "changed": round(100 * float(1 - both.sum(-1).mean() / keep), 1),
    }
