"""Curves fitted to a mean attention.

The forms (`_exponential` and the following) take the attention scaled to mean 1, of shape (n,), and
where it was measured. They return the curve, of shape (n,), and its parameters: amplitudes in that
scale, rates per token.
"""

from __future__ import annotations

import math
from typing import NamedTuple, NoReturn, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pore._saved.forms import brief
from pore.bias.judging import Floats as Floats
from pore.bias.judging import floored
from pore.errors import ProfileError, ScoreError

_MAX_LOG_GROWTH = math.log(1e6)


class Fit(NamedTuple):
    """A curve fitted to a mean attention.

    Attributes:
        curve: (n,) the curve, positive, for an attention of mean 1.
        parameters: The numbers that it is computed from, in units of the attention.
        r2: Share of the attention's variance that it explains.
        residuals: (n,) the attention minus the curve, in units of the attention.
    """

    curve: Floats
    parameters: dict[str, float]
    r2: float
    residuals: Floats


class Points(NamedTuple):
    """Where a mean attention was measured.

    Attributes:
        t: (n,) the points, ascending from 0 to 1.
        weight: (n,) weights of the points, of mean 1.
        length: How many tokens lie between the first and the last.
        logs: Whether all curves but the one with an offset are fitted to the logarithm of the
            attention, which makes a spline positive however few samples there are.
    """

    t: Floats
    weight: Floats
    length: float
    logs: bool = False

    @classmethod
    def even(cls, n: int, logs: bool = False) -> Points:
        """The points of the n tokens of an image, all with the same weight."""
        return cls(np.linspace(0, 1, n), np.ones(n), max(n - 1, 1), logs)


def fit(mean_attention: Tensor | npt.ArrayLike, kind: str, points: Points | None = None) -> Fit:
    """The curve of a kind that is nearest to a mean attention, by least squares.

    Args:
        mean_attention: As in `PositionBias.fit`.
        kind: As in `PositionBias.fit`.
        points: Where it was measured; None for the tokens of an image, one after another.

    Returns:
        The fit.

    Raises:
        ScoreError: The attention is not a vector of enough finite, non-negative numbers, not all of
            them zero.
        ProfileError: There is no such kind, or the best fit is not positive and finite.
    """
    if kind not in _FORMS:
        raise ProfileError(
            f"Cannot fit a position bias of kind {brief(kind)}; choose exponential, "
            "exponential+offset, spline or empirical; for images of any size, over the distance, "
            "also power."
        )
    least, form = _FORMS[kind]
    observed = _observed(mean_attention)
    if len(observed) < least:
        raise ScoreError(
            f"A {kind} bias needs at least {least} positions to be fitted, not {len(observed)}; "
            'kind="empirical" takes any number.'
        )
    scale = float(observed.mean())
    scaled = observed / scale
    points = points or Points.even(len(observed))
    curve, parameters = form(scaled, points)
    for name in parameters.keys() & {"amplitude", "offset"}:
        parameters[name] *= scale
    if not curve.min() > 0:
        raise ProfileError(
            f"The {kind} fit is not positive everywhere (its least value is "
            f"{curve.min() * scale:g}), so attention cannot be divided by it. "
            + (
                "Average over more samples, or fit another kind."
                if kind == "empirical"
                else 'Fit kind="exponential", which is positive by form.'
            )
        )
    residuals = scaled - curve
    mean = np.average(scaled, weights=points.weight)
    spread = float((points.weight * (scaled - mean) ** 2).sum())
    flat = spread <= len(scaled) * 1e-24
    r2 = 1.0 if flat else 1.0 - float((points.weight * residuals**2).sum()) / spread
    return Fit(curve, parameters, r2, residuals * scale)


def _observed(mean_attention: Tensor | npt.ArrayLike) -> Floats:
    """The mean attention as a vector; ScoreError if it cannot be used."""
    if isinstance(mean_attention, Tensor):
        mean_attention = mean_attention.detach().to("cpu", torch.float64).numpy()
    observed = np.asarray(mean_attention, dtype=np.float64)
    if observed.ndim != 1 or not len(observed):
        raise ScoreError(
            f"The mean attention must be a vector over the visual tokens, not of shape "
            f"{observed.shape}."
        )
    if not np.isfinite(observed).all():
        raise ScoreError(
            f"The mean attention holds {int((~np.isfinite(observed)).sum())} values that are NaN "
            "or infinite. Look for the samples that made them; a model in float16 may overflow, "
            "bfloat16 does not."
        )
    if (observed < 0).any():
        raise ScoreError(
            "The mean attention holds negative values; give the attention after its softmax."
        )
    if not (observed > 0).any():
        raise ScoreError(
            "The mean attention is zero everywhere: no visual token was seen. Check the positions "
            "of the visual tokens and the layer."
        )
    return observed


def _exponential(y: Floats, at: Points) -> tuple[Floats, dict[str, float]]:
    """Least squares of a·exp(β·t)."""
    from scipy.optimize import least_squares

    t, root = at.t, np.sqrt(at.weight)
    if at.logs:
        beta, constant = np.polyfit(t, np.log(floored(y)), 1, w=root)
        if abs(beta) >= _MAX_LOG_GROWTH:
            _refuse_growth("exponential")
        return np.exp(constant + beta * t), {
            "amplitude": math.exp(constant),
            "rate": float(beta) / at.length,
        }

    def amplitude(beta: float) -> float:
        basis = root * np.exp(beta * t)
        return float(basis @ (root * y) / (basis @ basis))

    def residuals(p: Floats) -> Floats:
        return cast(Floats, root * (p[0] * np.exp(p[1] * t) - y))

    # For a given rate the amplitude is linear, so the best start is found by trying rates.
    rates = np.linspace(-_MAX_LOG_GROWTH, _MAX_LOG_GROWTH, 57)
    starts = [np.array([amplitude(beta), beta]) for beta in rates]
    start = min(starts, key=lambda p: float((residuals(p) ** 2).sum()))
    found = least_squares(residuals, start, xtol=1e-14, ftol=1e-14, gtol=1e-14)
    a, beta = found.x
    if not (a > 0 and abs(beta) < _MAX_LOG_GROWTH):
        _refuse_growth("exponential")
    curve = a * np.exp(beta * t)
    return curve, {"amplitude": float(a), "rate": float(beta) / at.length}


def _exponential_offset(y: Floats, at: Points) -> tuple[Floats, dict[str, float]]:
    """Least squares of a·exp(β·t) + c, positive at both ends and so everywhere.

    Parametrised by its values at both ends and its curvature β, so that it is well conditioned even
    for a straight line (β = 0).
    """
    from scipy.optimize import least_squares

    t, root = at.t, np.sqrt(at.weight)
    floor = max(float(y.min()) / 2, 1e-6)

    def rise(beta: float) -> Floats:
        return cast(Floats, np.expm1(beta * t) / np.expm1(beta) if abs(beta) > 1e-9 else t)

    def residuals(p: Floats) -> Floats:
        return cast(Floats, root * (p[0] + (p[1] - p[0]) * rise(float(p[2])) - y))

    def start_at(beta: float) -> Floats:
        g = rise(beta)
        sides = np.stack([root * (1 - g), root * g], axis=1)
        ends = np.linalg.lstsq(sides, root * y, rcond=None)[0]
        return np.array([*np.maximum(ends, floor * 1.001), beta])

    rates = np.linspace(-_MAX_LOG_GROWTH, _MAX_LOG_GROWTH, 58)
    start = min(map(start_at, rates), key=lambda p: float((residuals(p) ** 2).sum()))
    bound = _MAX_LOG_GROWTH * 1.001
    found = least_squares(
        residuals,
        start,
        bounds=([floor, floor, -bound], [np.inf, np.inf, bound]),
        xtol=1e-14,
        ftol=1e-14,
        gtol=1e-14,
    )
    first, last, beta = (float(x) for x in found.x)
    if abs(beta) >= _MAX_LOG_GROWTH:
        _refuse_growth("exponential+offset")
    # A straight line has no finite a and c; a curve as flat as this cannot be told from one.
    beta = math.copysign(max(abs(beta), 1e-6), beta)
    curve = first + (last - first) * rise(beta)
    a = (last - first) / math.expm1(beta)
    return curve, {"amplitude": a, "rate": beta / at.length, "offset": first - a}


def _refuse_growth(kind: str) -> NoReturn:
    raise ProfileError(
        f"No {kind} fits the mean attention: it jumps by more than a factor of a million between "
        "the first position and the last. Look at the attention (a sink at one position?), or fit "
        'kind="spline" or "empirical".'
    )


def _spline(y: Floats, at: Points) -> tuple[Floats, dict[str, float]]:
    """Least-squares cubic spline with evenly spaced knots; the BIC chooses their number."""
    from scipy.interpolate import make_lsq_spline

    n, choices = len(y), []
    if at.logs:
        y = np.log(floored(y))
    for interior in (0, 1, 3, 7):
        free = interior + 4
        if interior and n < 4 * free:
            break
        between = np.quantile(at.t, np.linspace(0, 1, interior + 2)[1:-1])
        knots = np.r_[[0.0] * 4, between, [1.0] * 4]
        # A spline's weights multiply the differences, not their squares.
        curve = make_lsq_spline(at.t, y, knots, w=np.sqrt(at.weight))(at.t)
        # y (of mean 1) is rounded, so smaller variances cannot be told from an exact fit.
        variance = max(float((at.weight * (y - curve) ** 2).mean()), 1e-24)
        choices.append((n * math.log(variance) + free * math.log(n), interior, curve))
    _, interior, curve = min(choices, key=lambda choice: choice[0])
    return np.exp(curve) if at.logs else curve, {"knots": float(interior)}


def _itself(y: Floats, at: Points) -> tuple[Floats, dict[str, float]]:
    return y, {}


# For every kind, the fewest positions that it can be fitted to, and its form.
_FORMS = {
    "exponential": (3, _exponential),
    "exponential+offset": (4, _exponential_offset),
    "spline": (5, _spline),
    "empirical": (1, _itself),
}
