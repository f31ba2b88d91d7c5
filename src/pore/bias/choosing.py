"""Chooses the curve of a position bias by its error on data that it was not fitted to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pore.bias.fitting import Fit, Floats, Points, fit
from pore.bias.judging import NOTHING, log_error, too_little
from pore.errors import ProfileError, ScoreError

CHOICES = ("exponential", "exponential+offset", "spline")
"""The kinds to choose from, simpler ones first. The raw mean is not among them: it would count what
the pictures of the calibration set show as bias."""


class Judged(NamedTuple):
    """How every kind of curve does on data that it was not fitted to.

    Attributes:
        errors: The held-out error (see `log_error`) of every kind that could be fitted, and of
            "flat" and "empirical" for comparison.
        refused: The reason for every kind that cannot be divided by.
        fits: For every kind that could be fitted, the fit to all data.
    """

    errors: Mapping[str, float]
    refused: Mapping[str, str]
    fits: Mapping[str, Fit]

    @property
    def best(self) -> str | None:
        """The kind with the least error among `CHOICES` that can be divided by, or None."""
        able = [kind for kind in CHOICES if kind in self.errors and kind not in self.refused]
        return min(able, key=self.errors.__getitem__, default=None)


class Choice(NamedTuple):
    """What was chosen, and from what.

    Attributes:
        kind: The kind with the least held-out error among those that can be divided by.
        fit: Its fit to all data.
        errors: As in `Judged`.
        refused: As in `Judged`.
    """

    kind: str
    fit: Fit
    errors: Mapping[str, float]
    refused: Mapping[str, str]


PointsOf = Callable[[str], Points]
"""Returns the points at which a kind of curve is fitted."""


def held_out(halves: Sequence[Floats], kind: str, points: Points) -> float:
    """The error of a kind on one half of the data if fitted to the other, averaged over both ways.

    Args:
        halves: Two (n,) mean attentions.
        kind: A kind of curve, or "flat" for no bias at all.
        points: Where they were measured.

    Raises:
        PoreError: The kind cannot be fitted to one of the halves.
    """
    errors = []
    for mine, other in (halves, halves[::-1]):
        curve = np.ones_like(mine) if kind == "flat" else fit(mine, kind, points).curve
        errors.append(log_error(curve, other, points.weight))
    return float(np.mean(errors))


def judge(measured: Floats, halves: Sequence[Floats], points: PointsOf | None = None) -> Judged:
    """How every kind of curve does on the half of the data that it was not fitted to.

    Args:
        measured: (n,) the mean attention of all images.
        halves: The mean attention of each of two halves of the images.
        points: Where it was measured; None for the tokens of an image, one after another.

    Raises:
        ScoreError: No curve can be fitted to this attention.
    """
    points = points or (lambda kind: Points.even(len(measured)))
    errors, refused, fits = {}, {}, {}
    for kind in ("flat", *CHOICES, "empirical"):
        try:
            errors[kind] = held_out(halves, kind, points(kind))
            if kind != "flat":
                fits[kind] = fit(measured, kind, points(kind))
        except ProfileError as error:
            refused[kind] = str(error)
            continue
        if kind in CHOICES and (times := too_little(fits[kind].curve, measured)) > NOTHING:
            refused[kind] = (
                f"in a part of the image it is {times:,.0f} times smaller than the attention, and "
                "dividing by it would raise that part as much"
            )
    return Judged(errors, refused, fits)


def choose(measured: Floats, halves: Sequence[Floats], points: PointsOf | None = None) -> Choice:
    """The curve that best describes data that it was not fitted to.

    Args:
        measured: (n,) the mean attention of all images.
        halves: The mean attention of each of two halves of the images.
        points: Where it was measured; None for the tokens of an image, one after another.

    Raises:
        ScoreError: No curve can be fitted to this attention.
        ProfileError: No curve can be divided by; the message says why for each.
    """
    judged = judge(measured, halves, points)
    kind = judged.best
    if kind is None:
        raise ProfileError(f"No curve can be divided by. {listed(judged.refused)}")
    return Choice(kind, judged.fits[kind], judged.errors, judged.refused)


def listed(refused: Mapping[str, str]) -> str:
    """Which kinds are refused and why, in a line."""
    return "; ".join(f"{kind}: {why}" for kind, why in refused.items())


def need_halves(images: Sequence[int]) -> None:
    """Raise ScoreError if one of the halves has no image."""
    if min(images) < 1:
        raise ScoreError(
            f"Choosing a curve by its held-out error needs images in both halves of the data; "
            f"here they have {images[0]} and {images[1]}. Calibrate on more images, or name a kind."
        )
