"""How well a position bias describes the attention, judged on data that it was not fitted to.

R² does not tell this. At decoder layer 2 of a real language model we found an exponential with an
R² of 0.8 that falls 5,199-fold from the bottom of the image to the top, while the measured
attention falls 13-fold: the last positions hold nearly all of the variance. Dividing by it
multiplies the top of the image by hundreds. What counts for a division is the ratio of curve and
attention at every position.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


BLOCKS = 12
"""Number of parts of an image, in reading order, whose means are compared to reduce noise."""

FAR = 2.0
"""By what factor the span of a curve may differ from the attention's without a warning."""

NOTHING = 10.0
"""By what factor a curve may lie below the attention in a part of the image without refusal."""

_LEAST = 1e-3  # attention below this share of its mean counts as this share


def floored(attention: Floats) -> Floats:
    """Mean attention of which a logarithm can be taken: at least a thousandth of its mean."""
    found: Floats = np.maximum(attention, _LEAST * attention.mean())
    return found


def log_error(curve: Floats, measured: Floats, weight: Floats | None = None) -> float:
    """By what factor a curve typically misses the measured attention, as a logarithm.

    0.1 means about 10 %. The scales of both do not matter, because they do not change a ranking.

    Args:
        curve: (n,) the curve, positive.
        measured: (n,) mean attention.
        weight: (n,) weights of the positions; None if all count alike.

    Returns:
        The standard deviation of ln(measured / curve).
    """
    ratio = np.log(floored(measured) / curve)
    mean = np.average(ratio, weights=weight)
    return float(np.sqrt(np.average((ratio - mean) ** 2, weights=weight)))


def block_means(values: Floats) -> Floats:
    """(b,) means over `BLOCKS` parts of equal length, or the single values if there are fewer."""
    parts = np.array_split(values, min(BLOCKS, len(values)))
    return np.array([part.mean() for part in parts])


def span(values: Floats) -> float:
    """How many times more the largest part gets than the smallest."""
    blocks = block_means(values)
    return float(blocks.max() / floored(blocks).min())


def too_little(curve: Floats, measured: Floats) -> float:
    """By what factor a curve lies below the attention in the part where that factor is largest.

    Args:
        curve: (n,) the curve.
        measured: (n,) mean attention.
    """
    curve, measured = block_means(curve / curve.mean()), block_means(measured / measured.mean())
    return float((measured / curve).max())


def warning_of(kind: str, curve: Floats, measured: Floats) -> str | None:
    """The warning about a curve that spans far more, or less, than the attention.

    Args:
        kind: Its form.
        curve: (n,) the curve.
        measured: (n,) mean attention.

    Returns:
        The warning; None if there is nothing to warn about.
    """
    mine, theirs = span(curve), span(measured)
    if 1 / FAR <= mine / theirs <= FAR:
        return None
    more = "more" if mine > theirs else "less"
    return (
        f"The {kind} curve spans a factor of {mine:.3g} between the parts of the image, far {more} "
        f"than the attention that it was fitted to, which spans {theirs:.3g}. Divided by this "
        'curve, the ranking would prefer a part of the image for no reason; fit kind="spline", or '
        'kind="auto", which chooses by held-out error.'
    )
