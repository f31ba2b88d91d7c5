"""The coordinates that a position bias for images of any size depends on, and their bins.

- "distance": how many tokens later the last token of the prompt comes, from 1 on. The bins are
  eighths of an octave: fine near the text, where attention changes fast, and coarse far away.
- "raster": the relative place of a token in reading order, from 0 to 1.
- "place": the relative row and the relative column of a token, each from 0 to 1.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Over = Literal["distance", "place", "raster"]


OVER: tuple[Over, ...] = get_args(Over)


_PER_OCTAVE = 8


SIDE = 16
"""Number of rows and columns that every image is divided into, whatever its grid."""

BINS: dict[Over, int] = {"distance": 24 * _PER_OCTAVE, "place": SIDE * SIDE, "raster": 48}
"""The number of bins; distances go up to 2^24."""


def bins_of(over: Over, where: np.ndarray) -> np.ndarray:
    """The bin of every token.

    Args:
        over: The name of the coordinate.
        where: (..., N) distances or relative raster positions, or (..., N, 2) rows and columns.

    Returns:
        (..., N) whole numbers below `BINS[over]`.
    """
    if over == "distance":
        found = np.floor(_PER_OCTAVE * np.log2(np.maximum(where, 1)) + 1e-9)
    elif over == "raster":
        found = np.floor(where * BINS["raster"])
    else:
        cells = np.clip(np.floor(where * SIDE), 0, SIDE - 1)
        found = cells[..., 0] * SIDE + cells[..., 1]
    bins: np.ndarray = np.clip(found, 0, BINS[over] - 1).astype(int)
    return bins


def centers_of(over: Over, bins: np.ndarray) -> np.ndarray:
    """The centre of every bin.

    Args:
        over: The coordinate: "distance" or "raster"; with "place", bins are rows or columns.
        bins: (B,) bins.

    Returns:
        (B,) coordinates; for a distance, the mean of the whole numbers in the bin.
    """
    if over == "distance":
        least, most = (np.ceil(2 ** ((bins + more) / _PER_OCTAVE) - 1e-6) for more in (0, 1))
        centers: np.ndarray = (least + np.maximum(most - 1, least)) / 2
        return centers
    return np.asarray((bins + 0.5) / (SIDE if over == "place" else BINS["raster"]))
