"""Choosing the curve of a position bias by its error on data that it was not fitted to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pore.bias.fitting import Fit, Floats, Points, fit
from pore.bias.judging import NOTHING, log_error, too_little
from pore.errors import ProfileError, ScoreError

CHOICES = ("exponential", "exponential+offset", "spline")


"""The kinds to choose from, simpler ones first. The raw mean is none: what it knows of the pictures
of the calibration set it takes for bias."""


class Judged(NamedTuple):
    """How every kind of curve does on data that it was not fitted to.

    Attributes:
        errors: Of every kind that could be fitted, "flat" and "empirical" for comparison: the
            held-out error, see `log_error`.
        refused: Of kinds that cannot be divided by, the reason.
        fits: Of every kind that could be fitted, the fit to all data.
    """

    errors: Mapping[str, float]
    refused: Mapping[str, str]
    fits: Mapping[str, Fit]

    @property
    def best(self) -> str | None:
        """Of the kinds to choose from that can be divided by, that of the least error, or None."""
        able = [kind for kind in CHOICES if kind in self.errors and kind not in self.refused]
        return min(able, key=self.errors.__getitem__, default=None)


class Choice(NamedTuple):
    """What was chosen, and from what.

    Attributes:
        kind: The kind of the least held-out error among those that can be divided by.
        fit: It, fitted to all.
        errors: As in `Judged`.
        refused: As in `Judged`.
    """

    kind: str
    fit: Fit
    errors: Mapping[str, float]
    refused: Mapping[str, str]


PointsOf = Callable[[str], Points]


"""Gives the points that a kind of curve is fitted at."""


def held_out(halves: Sequence[Floats], kind: str, points: Points) -> float:
    """The error of a kind on either half of the data when fitted to the other, on average.

    Args:
        halves: Two (n,) mean attentions.
        kind: A kind of curve, or "flat" for no bias at all.
        points: Where they were measured.

    Raises:
        PoreError: It cannot be fitted to a half.
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
        halves: That of each of two halves of the images.
        points: Where it was measured; None for the tokens of an image, one after another.

    Raises:
        ScoreError: The attention is none that a curve can be fitted to.
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
                f"it lies {times:.3g} times below the attention in a part of the image, which a "
                "division would raise as often"
            )
    return Judged(errors, refused, fits)


def choose(measured: Floats, halves: Sequence[Floats], points: PointsOf | None = None) -> Choice:
    """The curve that describes best what it was not fitted to.

    Args:
        measured: (n,) the mean attention of all images.
        halves: That of each of two halves of the images.
        points: Where it was measured; None for the tokens of an image, one after another.

    Raises:
        ScoreError: The attention is none that a curve can be fitted to.
        ProfileError: No curve can be divided by; the message says why of each.
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
    """Refuse halves of which one has no image, or ScoreError."""
    if min(images) < 1:
        raise ScoreError(
            f"To choose a curve by its held-out error takes images in both halves of the data; "
            f"here they have {images[0]} and {images[1]}. Calibrate on more images, or name a kind."
        )
