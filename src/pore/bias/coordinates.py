"""What a position bias for images of any size is a function of, and the bins to measure it in.

- "distance": how many tokens farther on the last token of the prompt is, from 1 on. The bins are
  eighths of an octave: fine near the text, where attention changes fast, and coarse far away.
- "raster": how far into the image a token comes in reading order, from 0 to 1.
- "place": the relative row and the relative column of a token, each from 0 to 1.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Over = Literal["distance", "place", "raster"]


OVER: tuple[Over, ...] = get_args(Over)


_PER_OCTAVE = 8


SIDE = 16


"""Rows and columns that an image is divided into, whatever its own are."""


BINS: dict[Over, int] = {"distance": 24 * _PER_OCTAVE, "place": SIDE * SIDE, "raster": 48}


"""How many bins there are; distances go up to 2^24."""


def bins_of(over: Over, where: np.ndarray) -> np.ndarray:
    """The bin of every token.

    Args:
        over: What the coordinates are.
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
    """Where the middle of bins lies.

    Args:
        over: What they are of: "distance" or "raster"; of "place", rows or columns of `SIDE`.
        bins: (B,) bins.

    Returns:
        (B,) coordinates; of distances, the mean of the whole numbers in the bin.
    """
    if over == "distance":
        least, most = (np.ceil(2 ** ((bins + more) / _PER_OCTAVE) - 1e-6) for more in (0, 1))
        centers: np.ndarray = (least + np.maximum(most - 1, least)) / 2
        return centers
    return np.asarray((bins + 0.5) / (SIDE if over == "place" else BINS["raster"]))
