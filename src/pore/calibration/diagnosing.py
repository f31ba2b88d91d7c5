"""Makes the diagnosis of a position bias from the sums to which it is fitted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pore.bias.any_size_fitting import Levels, Measured, curves_of
from pore.bias.choosing import Judged, PointsOf, judge
from pore.bias.coordinates import SIDE, Over
from pore.bias.fitting import Floats, Points, fit
from pore.bias.judging import floored, log_error, span
from pore.calibration.diagnosis import AxisDiagnosis, Diagnosis
from pore.calibration.typical import PARTS, Tokens, Typical
from pore.errors import ProfileError

_Z95 = 1.96


class Axis(NamedTuple):
    """The attention along one axis.

    Attributes:
        name: The axis.
        points: Returns the points where it was measured, for a kind of curve.
        weight: (K,) the weights of these points.
        attention: (K,) the mean attention there.
        halves: The mean attention (K,) of each half of the images.
        error: (K,) the standard error of the mean, relative to it.
        noise: The held-out error that a perfect curve would have.
        tokens: (N,) for every token of a typical image, the point at which it is.
    """

    name: str
    points: PointsOf
    weight: Floats
    attention: Floats
    halves: Sequence[Floats]
    error: Floats
    noise: float
    tokens: np.ndarray


def of_positions(
    mean: Floats,
    spread: Floats,
    halves: Sequence[tuple[int, Floats]],
    kind: str,
    keep: int | float,
    logs: bool = False,
) -> Diagnosis:
    """The diagnosis of a bias over the positions of images of one size.

    Args:
        mean: (N,) the mean attention.
        spread: (N,) its standard deviation over images.
        halves: For each half, its number of images and their mean attention.
        kind: A kind of curve, or "auto".
        keep: How many tokens are kept, or which share of them.
        logs: Whether means are geometric, and curves fitted to logarithms.

    Raises:
        PoreError: No curve can be fitted to this attention, or `keep` is not a budget.
    """
    axes, tokens = along_positions(mean, spread, halves, logs)
    return _diagnosis(axes, tokens, kind, keep, sum(images for images, _ in halves))


def along_positions(
    mean: Floats, spread: Floats, halves: Sequence[tuple[int, Floats]], logs: bool
) -> tuple[list[Axis], Tokens]:
    """The axis of images of one size, and their tokens; arguments are as in `of_positions`."""
    n, counts = len(mean), [images for images, _ in halves]
    relative = np.divide(spread, mean, out=np.zeros(n), where=mean > 0)
    axis = Axis(
        "position",
        lambda kind: Points.even(n, logs),
        np.ones(n),
        mean,
        [half for _, half in halves],
        relative / math.sqrt(sum(counts)),
        math.sqrt(float((relative**2).mean()) * float(np.mean([1 / count for count in counts]))),
        np.arange(n),
    )
    return [axis], Tokens(mean, spread, np.arange(n) * PARTS // n)


def of_any_size(
    levels: Levels,
    halves: Sequence[Levels],
    over: Over,
    kind: str,
    keep: int | float,
    images: int,
    tokens: int,
) -> Diagnosis:
    """The diagnosis of a bias for images of any size.

    Args:
        levels: The attention of all images.
        halves: The attention of each half of them.
        over: The coordinate that the bins divide.
        kind: A kind of curve, or "auto".
        keep: How many tokens are kept, or which share of them.
        images: How many images there are.
        tokens: Number of tokens of a typical image, in the size to which most tokens belong.

    Raises:
        PoreError: As in `of_positions`.
    """
    axes, typical = along_bins(levels, halves, over, tokens)
    return _diagnosis(axes, typical, kind, keep, images)


def along_bins(
    levels: Levels, halves: Sequence[Levels], over: Over, tokens: int
) -> tuple[list[Axis], Tokens]:
    """The axes of images of any size, and the tokens of a typical one; as in `of_any_size`."""
    usual = int(levels.tokens.sum(1).argmax())
    # A typical image has tokens in every bin as often as the measured ones of its size.
    shares = levels.tokens[usual].cumsum() / levels.tokens[usual].sum()
    order = np.arange(tokens)
    at = np.searchsorted(shares, (order + 0.5) / tokens)
    others = [curves_of(half, over) for half in halves]
    axes = [
        _of_bins(one, [each[number] for each in others], _index(levels.bins, at, one.name))
        for number, one in enumerate(curves_of(levels, over))
    ]
    # Bins ascend in reading order, except for distances: the nearest to the text come last.
    part = (order[::-1] if over == "distance" else order) * PARTS // tokens
    return axes, Tokens(levels.mean[usual][at], levels.spread[usual][at], part)


def _of_bins(one: Measured, others: Sequence[Measured], index: np.ndarray) -> Axis:
    """An axis measured in bins; the difference of the halves tells how certain their means are."""
    points, halves = one.points, [other.at(one.points) for other in others]
    first, second = map(floored, halves)
    apart = log_error(first, second, points.weight)
    error = np.full(len(points.at), apart / 2)
    name, weight = one.name, points.weight
    return Axis(name, points.by, weight, one.attention, halves, error, apart / math.sqrt(2), index)


def _index(bins: np.ndarray, at: np.ndarray, axis: str) -> np.ndarray:
    """For tokens in some bins, the points of an axis at which they are."""
    if axis not in ("row", "column"):
        return at
    side = bins // SIDE if axis == "row" else bins % SIDE
    found: np.ndarray = np.searchsorted(np.unique(side), side[at])
    return found


def _diagnosis(
    axes: Sequence[Axis], tokens: Tokens, kind: str, keep: int | float, images: int
) -> Diagnosis:
    judged = [judge(axis.attention, axis.halves, axis.points) for axis in axes]
    kinds = [each.best if kind == "auto" else kind for each in judged]
    curves = [_curve(each, form) for each, form in zip(judged, kinds, strict=True)]
    typical = Typical(tokens, keep)
    plain, after, changed, within = typical.kept(), None, None, None
    if (whole := at_tokens(curves, axes)) is not None:
        kept = typical.kept(whole)
        after, changed = typical.parts(kept), typical.apart(plain, kept)
        within = sum(map(_within, axes, curves))
    return Diagnosis(
        axes=tuple(map(_of_axis, axes, judged, kinds, curves)),
        images=images,
        keep=keep,
        standard_error=tuple(np.concatenate([axis.error for axis in axes]).tolist()),
        within=within,
        before=typical.parts(plain),
        after=after,
        changed=changed,
        unsure=_unsure(axes, kinds, typical),
    )


def _of_axis(axis: Axis, judged: Judged, kind: str | None, curve: Floats | None) -> AxisDiagnosis:
    return AxisDiagnosis(
        name=axis.name,
        kind=kind,
        span=span(axis.attention),
        fitted=None if curve is None else span(curve),
        errors=dict(judged.errors),
        refused=dict(judged.refused),
        noise=axis.noise,
    )


def _curve(judged: Judged, kind: str | None) -> Floats | None:
    """The curve of a kind; None if there is none, or it cannot be fitted."""
    found = judged.fits.get(kind or "")
    return None if found is None else found.curve


def at_tokens(curves: Sequence[Floats | None], axes: Sequence[Axis]) -> Floats | None:
    """(N,) P at every token of a typical image; None if an axis has no curve."""
    found = np.ones(len(axes[0].tokens))
    for curve, axis in zip(curves, axes, strict=True):
        if curve is None:
            return None
        found = found * curve[axis.tokens]
    return found


def _within(axis: Axis, curve: Floats | None) -> int:
    """The number of points at which the curve is within the confidence band of the mean."""
    assert curve is not None
    ratio = np.log(floored(axis.attention) / curve)
    ratio -= np.average(ratio, weights=axis.weight)
    return int((np.abs(ratio) <= _Z95 * axis.error).sum())


def _unsure(axes: Sequence[Axis], kinds: Sequence[str | None], typical: Typical) -> float | None:
    """The share of kept tokens in which P of the two halves of the images differ."""
    kept = []
    for half in (0, 1):
        curves: list[Floats | None] = []
        for axis, kind in zip(axes, kinds, strict=True):
            if kind is None:
                return None
            try:
                curves.append(fit(axis.halves[half], kind, axis.points(kind)).curve)
            except ProfileError:
                return None
        curve = at_tokens(curves, axes)
        assert curve is not None
        kept.append(typical.kept(curve))
    return typical.apart(*kept)
