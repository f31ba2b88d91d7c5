"""Which part of a picture each view shows, read off the colours that the processor returns.

A *view* is what goes through the vision tower as one picture: a tile, a crop or the whole picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# A pixel with this share of the picture (relative to the purest pixel) is free of padding.
_PURE = 0.99

# A view of which no pixel has a larger share of the picture shows nothing of it.
_NONE = 0.02

# So near to the edge of a picture, in pixels before and after resizing, resizing bends the slope.
_BENT = 3

# Fewer lines of pixels than this do not tell the scale.
_FEW = 4


def frames_of(
    white: Sequence[Tensor],
    black: Sequence[Tensor],
    sloped: Sequence[Tensor],
    size: tuple[int, int],
) -> list[list[float]]:
    """The part of a picture that every view shows.

    Args:
        white: The views (3, H, W) of a white picture.
        black: The views of a black picture.
        sloped: The views of a picture whose red grows from left to right and green from top to
            bottom.
        size: (width, height) of the pictures.

    Returns:
        (left, top, right, bottom) for every view.
    """
    # Padding is the same in white and black. Channels differ by what they are normalised with.
    spans = [light - dark for light, dark in zip(white, black, strict=True)]
    full = torch.stack([span.amax((1, 2)) for span in spans]).amax(0).double().numpy()
    frames = []
    for span, dark, slope in zip(spans, black, sloped, strict=True):
        # Resizing works on rows and columns separately, so one row and one column suffice.
        # The middle is away from where padding, blended with the picture, bends a slope.
        row, column = _middle(span[0].sum(1)), _middle(span[1].sum(0))
        across = [view[0, row].double().numpy() for view in (span, dark, slope)]
        down = [view[1, :, column].double().numpy() for view in (span, dark, slope)]
        shares = [across[0] / full[0], down[0] / full[1]]
        peak = float(shares[0].max())
        if peak < _NONE:
            frames.append([math.nan] * 4)
            continue
        lines = [int((share > 0.5 * peak).sum()) for share in shares]
        edges = []
        for axis, (own, none, values) in enumerate((across, down)):
            pure = shares[axis] > _PURE * shares[axis].max()
            place = size[axis] * np.where(pure, (values - none) / np.where(pure, own, 1), 0)
            # A picture thinner than a pixel has no pure one, because of its thinner side.
            thin = lines[axis] < lines[1 - axis]
            share = shares[axis] if thin else shares[axis] / peak
            edges.append(_edges(place, pure, share, size[axis]))
        (left, right), (top, bottom) = edges
        frames.append([left, top, right, bottom])
    return frames


def _middle(sums: Tensor) -> int:
    """The middle one of the lines of pixels that hold the most."""
    most = (sums > 0.9 * sums.max()).nonzero()
    return int(most[len(most) // 2])


def _edges(
    place: npt.NDArray[np.float64],
    pure: npt.NDArray[np.bool_],
    share: npt.NDArray[np.float64],
    length: int,
) -> tuple[float, float]:
    """Which stretch of a side of a picture a view shows.

    Args:
        place: (n,) where on the side each line of pixels of the view comes from.
        pure: (n,) of which lines that is known.
        share: (n,) how much of every line is picture.
        length: The length of the side, in pixels.

    Returns:
        Where the first line begins and the last one ends.
    """
    count = len(place)
    line = np.arange(count) + 0.5

    def fitted(chosen: npt.NDArray[np.bool_]) -> tuple[float, float] | None:
        if chosen.sum() < _FEW or np.ptp(place[chosen]) < 1e-6:
            return None
        slope, start = np.polyfit(line[chosen], place[chosen], 1)
        return float(slope), float(start)

    fit = fitted(pure)
    if length == 1 or fit is None:
        # All that there is of the picture in this view is the whole of the side.
        lines = float(share.sum())
        begin = float((share * line).sum()) / lines - lines / 2
        scale = length / lines
        return -begin * scale, (count - begin) * scale
    margin = _BENT * max(1.0, fit[0])
    inner = fitted(pure & (place >= margin) & (place <= length - margin))
    slope, start = inner or fit
    end = start + slope * count
    # Colours have 256 levels, so that edges are known to a part of a level.
    known = length / 1000 + 0.05
    start = 0.0 if abs(start) < known else start
    end = float(length) if abs(end - length) < known else end
    return start, end
