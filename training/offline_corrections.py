"""Corrections of the position bias of text-visual attention, tried on recorded rows.

A correction is fitted to the rows of calibration questions and then turns those of other questions
into scores; what is kept are the visual tokens of the highest score. All of it is plain NumPy, and
the curves are the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from attention_rows import LAYERS, Rows
from log_curves import fitted, line, spline

from pore.bias import PositionBias
from pore.bias.curve import Kind
from pore.errors import ProfileError

Floats = npt.NDArray[np.floating]

CURVES: tuple[Kind, ...] = ("exponential", "exponential+offset", "spline", "empirical")
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
_TINY = 1e-10


@dataclass(frozen=True)
class LayerRows:
    """The records of Q questions at one layer; see `attention_rows.Rows`.

    Attributes:
        attention: ``(Q, H, N)``.
        plain: ``(Q, H, N)``.
        null: ``(Q, N)``.
        text: ``(Q, N)``.
    """

    attention: Floats
    plain: Floats
    null: Floats
    text: Floats

    @property
    def scores(self) -> Floats:
        """``(Q, N)``: A, the mean over heads."""
        found: Floats = self.attention.mean(1)
        return found

    @property
    def mean(self) -> Floats:
        """``(N,)``: Ā, the mean of A over the questions."""
        found: Floats = self.scores.astype(np.float64).mean(0)
        return found

    @property
    def log_mean(self) -> Floats:
        """``(N,)``: the mean of ln A over the questions; its exponential is the geometric mean."""
        found: Floats = np.log(self.scores.astype(np.float64)).mean(0)
        return found

    def __getitem__(self, chosen: npt.NDArray[np.int64] | slice) -> LayerRows:
        return LayerRows(
            self.attention[chosen], self.plain[chosen], self.null[chosen], self.text[chosen]
        )


Scorer = Callable[[LayerRows], Floats]
"""Turns the rows of Q questions into scores, ``(Q, N)``."""

Correction = Callable[[LayerRows], Scorer]
"""Fits a `Scorer` to the rows of calibration questions."""


def at_layer(rows: Rows, layer: int) -> LayerRows:
    """The records of one layer, those of `LAYERS` having been recorded."""
    i = LAYERS.index(layer)
    return LayerRows(rows.attention[:, i], rows.plain[:, i], rows.null[:, i], rows.text[:, i])


def bias(mean_attention: Floats, kind: Kind) -> Floats:
    """``(N,)``: the library's P of some kind for a mean attention, of mean 1."""
    return PositionBias.fit(np.asarray(mean_attention, np.float64), kind).values.numpy()


# -- the corrections, each fitted to calibration rows ----------------------------------------------


def nothing(_: LayerRows) -> Scorer:
    """A itself: FastV."""
    return lambda rows: rows.scores


def divided(rows: LayerRows, kind: Kind, strength: float = 1.0) -> Scorer:
    """A / P^strength: PoRe; with the mean attention itself as P, D²Pruner's first step."""
    p = bias(rows.mean, kind) ** strength
    return lambda given: given.scores / p


def divided_by_middle(rows: LayerRows, middle: str, strength: float = 1.0) -> Scorer:
    """A / P^strength, P being what A usually is at a position rather than its mean over questions.

    Args:
        rows: Calibration rows.
        middle: "geometric" mean, "median", or a "line" or "spline" through the mean of ln A.
        strength: Power of P.
    """
    places = np.linspace(0, 1, rows.log_mean.size)
    p: Floats
    if middle == "median":
        p = np.median(rows.scores.astype(np.float64), 0)
    elif middle == "geometric":
        p = np.exp(rows.log_mean)
    else:
        columns = line(places) if middle == "line" else spline(places)
        p = fitted(columns, rows.log_mean)
    return lambda given: given.scores / p**strength


def geometric_by_share(rows: LayerRows) -> Scorer:
    """A / P^s, P the geometric mean and s the share of the variance of ln A that it explains.

    Where position explains little this does little, and no question has to be understood for it.
    """
    p = np.exp(rows.log_mean * explained_by_position(rows))
    return lambda given: given.scores / p


def rows_and_columns(rows: LayerRows) -> Scorer:
    """A / P, with P a factor for the row times a factor for the column."""
    side = round(len(rows.mean) ** 0.5)
    square = rows.mean.reshape(side, side)
    p = np.outer(square.mean(1), square.mean(0)).reshape(-1)
    p /= p.mean()
    return lambda given: given.scores / p


def by_head(rows: LayerRows, kind: Kind) -> Scorer:
    """Every head divided by a P of its own before the mean over heads.

    A head whose attention no curve of this kind fits is left as it is.
    """
    means = rows.attention.astype(np.float64).mean(0)
    curves = np.ones_like(means)
    for h, mean in enumerate(means):
        try:
            curves[h] = bias(mean, kind)
        except ProfileError:
            continue
    return lambda given: (given.attention / curves).mean(1)


def geometric_by_head(rows: LayerRows) -> Scorer:
    """Every head divided by its own geometric mean, of mean 1, before the mean over heads."""
    curves = np.exp(np.log(rows.attention.astype(np.float64) + _TINY).mean(0))
    curves /= curves.mean(-1, keepdims=True)
    return lambda given: (given.attention / curves).mean(1)


def without_rope(_: LayerRows) -> Scorer:
    """FEATHER's score: queries and keys not rotated, softmax over the visual tokens."""

    def scorer(rows: LayerRows) -> Floats:
        weights = np.exp(rows.plain - rows.plain.max(-1, keepdims=True))
        found: Floats = (weights / weights.sum(-1, keepdims=True)).mean(1)
        return found

    return scorer


def without_rope_divided(rows: LayerRows, kind: Kind) -> Scorer:
    """FEATHER's score, divided by a P of its own."""
    plain = without_rope(rows)
    p = bias(plain(rows).astype(np.float64).mean(0), kind)
    return lambda given: plain(given) / p


def null_token(_: LayerRows, of_text: bool = False, logarithm: bool = True) -> Scorer:
    """PriorTR: the attention P of what asks against Q, that of the first token after the image.

    Args:
        of_text: P is the mean over all tokens after the image, as PriorTR has it for LLaVA; else
            the attention of the last token, as everywhere here.
        logarithm: P · ln(P / Q), PriorTR's score; else P / Q.
    """

    def scorer(rows: LayerRows) -> Floats:
        p, q = (
            one / (one.sum(-1, keepdims=True) + _TINY)
            for one in (rows.text if of_text else rows.scores, rows.null)
        )
        ratio = (p + _TINY) / (q + _TINY)
        found: Floats = p * np.log(ratio) if logarithm else ratio
        return found

    return scorer


def subtracted(rows: LayerRows, strength: float) -> Scorer:
    """A − strength · mean(A) · P, with the mean attention as P, the mean being the question's."""
    p = bias(rows.mean, "empirical")
    return lambda given: given.scores - strength * given.scores.mean(-1, keepdims=True) * p


FIXED: Mapping[str, Correction] = {
    "none": nothing,
    "exponential": partial(divided, kind="exponential"),
    "exponential+offset": partial(divided, kind="exponential+offset"),
    "spline": partial(divided, kind="spline"),
    "empirical": partial(divided, kind="empirical"),
    "rows x columns": rows_and_columns,
    "line through ln A": partial(divided_by_middle, middle="line"),
    "spline through ln A": partial(divided_by_middle, middle="spline"),
    "geometric mean": partial(divided_by_middle, middle="geometric"),
    "geometric mean, by its share": geometric_by_share,
    "median": partial(divided_by_middle, middle="median"),
    "exponential by head": partial(by_head, kind="exponential"),
    "empirical by head": partial(by_head, kind="empirical"),
    "geometric mean by head": geometric_by_head,
    "without RoPE": without_rope,
    "without RoPE, spline": partial(without_rope_divided, kind="spline"),
    "null token, P ln(P/Q)": null_token,
    "null token, P/Q": partial(null_token, logarithm=False),
    "null token, P of all text": partial(null_token, of_text=True),
}
"""Corrections that leave nothing to be chosen."""

CHOSEN: Mapping[str, Mapping[float, Correction]] = {
    "exponential, strength": {
        s: partial(divided, kind="exponential", strength=s) for s in STRENGTHS
    },
    "spline, strength": {s: partial(divided, kind="spline", strength=s) for s in STRENGTHS},
    "empirical, strength": {s: partial(divided, kind="empirical", strength=s) for s in STRENGTHS},
    "geometric mean, strength": {
        s: partial(divided_by_middle, middle="geometric", strength=s) for s in STRENGTHS
    },
    "subtracted": {s: partial(subtracted, strength=s) for s in STRENGTHS},
}
"""Corrections with a number that is chosen on calibration questions."""


# -- what is chosen and told without looking at test questions -------------------------------------


def span(curve: Floats) -> float:
    """Mean over the last twelfth of the positions over that of the first."""
    twelfth = len(curve) // 12
    return float(curve[-twelfth:].mean() / curve[:twelfth].mean())


def spread_follows_mean(rows: LayerRows) -> float:
    """Slope of ln(standard deviation over questions) on ln(mean), over positions.

    Where attention is P times what a token is worth, the standard deviation is in proportion to the
    mean, and the slope is 1; where position adds to attention, it is 0.
    """
    scores = rows.scores.astype(np.float64)
    slope: float = np.polyfit(np.log(scores.mean(0)), np.log(scores.std(0)), 1)[0]
    return round(float(slope), 2)


def explained_by_position(rows: LayerRows) -> float:
    """Share of the variance of ln A within an image that the position explains.

    It needs no labels: it can be told of any model and any pictures.
    """
    logs = np.log(rows.scores.astype(np.float64))
    logs -= logs.mean(1, keepdims=True)
    return round(float(logs.mean(0).var() / logs.var()), 3)


def halves(n: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Numbers of the calibration questions in two halves, always the same."""
    order = np.random.default_rng(0).permutation(n)
    return np.sort(order[: n // 2]), np.sort(order[n // 2 :])


def log_error(p: Floats, mean: Floats) -> float:
    """How far a P is from a mean attention: standard deviation over positions of ln(mean / P).

    Tokens are ranked by A / P, so that what counts is by which factor P is off, and a factor that
    is the same everywhere does not count. An error in units of the attention would not see a P that
    is a hundred times too small where there is little attention, which puts those tokens first.
    """
    return float(np.log(mean / p).std())


def held_out_error(rows: LayerRows, kind: Kind) -> float:
    """`log_error` of a curve fitted to one half, on the other half; mean of both ways."""
    one, other = halves(len(rows.attention))
    try:
        errors = [
            log_error(bias(rows[a].mean, kind), rows[b].mean)
            for a, b in ((one, other), (other, one))
        ]
    except ProfileError:
        return float("inf")
    return float(np.mean(errors))


def best_curve(rows: LayerRows) -> Kind:
    """The kind of curve with the least held-out error."""
    return min(CURVES, key=partial(held_out_error, rows))


def best_strength(
    rows: LayerRows,
    options: Mapping[float, Correction],
    judge: Callable[[Floats, npt.NDArray[np.int64]], float],
) -> float:
    """The number with which a correction does best, fitted to one half and judged on the other.

    Args:
        rows: Calibration rows.
        options: The correction for every number.
        judge: Says how good scores are, given the numbers of the questions that they are of.
    """

    def goodness(correction: Correction) -> float:
        one, other = halves(len(rows.attention))
        pairs = ((one, other), (other, one))
        return float(np.mean([judge(correction(rows[a])(rows[b]), b) for a, b in pairs]))

    return max(options, key=lambda strength: goodness(options[strength]))
