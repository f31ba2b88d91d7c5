"""Fits P for images of any size to attention that is summed by bin and by size of the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch

from pore.bias.any_size import REACH, AnySizeBias, Axis
from pore.bias.choosing import choose
from pore.bias.coordinates import SIDE, Over, centers_of
from pore.bias.curve import Kind
from pore.bias.fitting import Floats, Points, fit
from pore.bias.provenance import Provenance
from pore.errors import ProfileError, ScoreError

_ROUNDS = 100  # at most, of fitting two factors in turn; they converge in a few


class Levels(NamedTuple):
    """The mean attention by bin and by size of the image.

    Attributes:
        bins: (B,) the bins.
        sizes: (C,) the sizes of images, in half octaves of their number of tokens.
        mean: (C, B) mean attention of every bin in images of C sizes.
        tokens: (C, B) number of tokens in this mean; 0 where there is none.
        spread: (C, B) the standard deviation of the attention of these tokens.
    """

    bins: np.ndarray
    sizes: np.ndarray
    mean: Floats
    tokens: Floats
    spread: Floats


def product(mean: Floats, weight: Floats) -> tuple[Floats, Floats]:
    """Two factors whose products are nearest to a table, by weighted least squares.

    A token of an image of 2,000 tokens gets less attention than one of an image of 200 at the same
    distance, and how much less depends on what else is in the prompt. So every size has its own
    factor, and the bias is the factor that all sizes share.

    Args:
        mean: (C, B) the table.
        weight: (C, B) weight of each entry; 0 for entries that do not count.

    Returns:
        (C,) and (B,), the second of weighted mean 1.
    """
    one = np.ones(len(mean))
    other = np.ones(mean.shape[1])
    for _ in range(_ROUNDS):
        before = other
        other = (weight * mean * one[:, None]).sum(0) / (weight * one[:, None] ** 2).sum(0)
        one = (weight * mean * other).sum(1) / (weight * other**2).sum(1)
        scale = np.average(other, weights=weight.sum(0))
        other, one = other / scale, one * scale
        if np.allclose(before, other, rtol=1e-12, atol=0):
            break
    return one, other


def fit_any_size(
    levels: Levels,
    halves: Sequence[Levels],
    over: Over,
    kind: str,
    sizes: tuple[int, int],
    provenance: Provenance,
) -> AnySizeBias:
    """The bias over some coordinate that is nearest to what was measured.

    Args:
        levels: The attention of all images.
        halves: The attention of each of two halves of the images, for "auto"; empty otherwise.
        over: The coordinate that the bins divide.
        kind: A kind of curve, or "auto" for the kind with the least held-out error. Over the
            distance also "power", a power of it, which holds for larger images than were measured.
        sizes: The smallest and largest number of visual tokens of the images.
        provenance: Where they come from.

    Raises:
        ScoreError: No curve can be fitted to this attention.
        ProfileError: The curve that fits best cannot be divided by.
    """
    curves = curves_of(levels, over)
    others = [curves_of(half, over) for half in halves]
    axes, parameters, kinds = [], dict[str, float](), []
    for number, (name, points, measured) in enumerate(curves):
        if kind == "auto":
            apart = [each[number].at(points) for each in others]
            chosen = choose(measured, apart, points.by)
            kinds.append(chosen.kind)
            parameters[f"{name} held-out error"] = chosen.errors[chosen.kind]
        else:
            kinds.append(kind)
        if kinds[-1] == "power":
            axis, parameters = _power(points, measured, over)
            axes.append(axis)
            continue
        found = fit(measured, kinds[-1], points.by(kinds[-1]))
        parameters |= {f"{name} {key}": value for key, value in found.parameters.items()}
        parameters[f"{name} r2"] = found.r2
        axes.append(Axis(torch.from_numpy(points.at), torch.from_numpy(found.curve)))
    # The two axes of a place may have different kinds; the bias is named by the more general one.
    forms = ("power", "exponential", "exponential+offset", "spline", "empirical")
    form = cast(Kind, max(kinds, key=forms.index))
    return AnySizeBias(over, form, tuple(axes), sizes, parameters, provenance)


def _power(points: Grades, measured: Floats, over: Over) -> tuple[Axis, dict[str, float]]:
    """Least squares of -b ln d + constant to the logarithm of the attention at distances d.

    Raises:
        ProfileError: It is not over the distance.
    """
    if over != "distance":
        raise ProfileError(f"A power is one of the distance, not of the {over}; fit another kind.")
    curve = fit(measured, "exponential", points.by("spline")).curve
    logs = np.log(points.at)
    width = logs[-1] - logs[0]
    power = float((np.log(curve[-1]) - np.log(curve[0])) / width) if width else 0.0
    at = np.unique(np.round(np.geomspace(1, REACH, 512)))
    return Axis(torch.from_numpy(at), torch.from_numpy(at**power)), {"power": power}


class Grades(NamedTuple):
    """Where a curve was measured: the coordinates and their weights."""

    at: Floats
    weight: Floats
    logarithmic: bool

    def by(self, kind: str) -> Points:
        """The points of a fit; a spline over distances is fitted over their logarithm."""
        at = np.log(self.at) if self.logarithmic and kind in ("spline", "empirical") else self.at
        width = max(at[-1] - at[0], 1e-12)
        weight = self.weight / self.weight.mean()
        return Points((at - at[0]) / width, weight, float(self.at[-1] - self.at[0]) or 1.0, True)


class Measured(NamedTuple):
    """The mean attention along an axis.

    Attributes:
        name: The axis: "distance", "raster", "row" or "column".
        points: (K) where it was measured.
        attention: (K,) the attention there, of weighted mean 1.
    """

    name: str
    points: Grades
    attention: Floats

    def at(self, points: Grades) -> Floats:
        """The attention at other points, interpolated linearly."""
        return np.interp(points.at, self.points.at, self.attention)


def curves_of(levels: Levels, over: Over) -> list[Measured]:
    """The mean attention along every axis of a coordinate; ScoreError if none was measured.

    Args:
        levels: The attention by bin and size.
        over: The coordinate that the bins divide.
    """
    if not len(levels.bins):
        raise ScoreError(f"No attention was measured over the {over}.")
    _, shape = product(levels.mean, levels.tokens)
    weight = levels.tokens.sum(0)
    if over != "place":
        at = centers_of(over, levels.bins)
        return [Measured(over, Grades(at, weight, over == "distance"), shape)]
    table, weights = np.zeros((SIDE, SIDE)), np.zeros((SIDE, SIDE))
    table[levels.bins // SIDE, levels.bins % SIDE] = shape
    weights[levels.bins // SIDE, levels.bins % SIDE] = weight
    rows, columns = weights.sum(1) > 0, weights.sum(0) > 0
    factors = product(table[rows][:, columns], weights[rows][:, columns])
    found = []
    for name, there, factor, count in zip(
        ("row", "column"), (rows, columns), factors, (weights.sum(1), weights.sum(0)), strict=True
    ):
        bins = there.nonzero()[0]
        points = Grades(centers_of("place", bins), count[bins], False)
        found.append(Measured(name, points, factor / np.average(factor, weights=count[bins])))
    return found
