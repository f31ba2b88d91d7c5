"""Smooth functions of position fitted to the logarithm of attention.

Attention over visual tokens has a long tail: where an object asked about lies, it is many times
larger than elsewhere. A mean over questions follows those few large values; a mean of logarithms
does not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.interpolate import BSpline

Floats = npt.NDArray[np.floating]

KNOTS = 7
"""Inner knots of a spline over the positions of an image, as many as the library takes at most."""


def line(x: Floats) -> Floats:
    """``(N, 2)``: the columns of a straight line in `x`; of the exponential, where logarithms are
    fitted.
    """
    return np.stack([np.ones_like(x), x], 1)


def spline(x: Floats, knots: int = KNOTS) -> Floats:
    """``(N, knots + 4)``: the columns of a cubic spline in `x`, from 0 to 1."""
    places = np.r_[[0.0] * 4, np.linspace(0, 1, knots + 2)[1:-1], [1.0] * 4]
    found: Floats = BSpline.design_matrix(np.clip(x, 0, 1), places, 3).toarray()
    return found


def fitted(columns: Floats, logarithms: Floats) -> Floats:
    """The exponential of the combination of columns ``(N, C)`` nearest to logarithms ``(N,)``."""
    found: Floats = np.exp(columns @ np.linalg.lstsq(columns, logarithms, rcond=None)[0])
    return found
