"""The figure of a position bias for images of any size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from pore._text import for_figure
from pore.bias.any_size_fitting import curves_of, product
from pore.bias.coordinates import SIDE
from pore.plotting.style import GREY, VERMILION, panels, style

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.figure import Figure

    from pore.bias.any_size import AnySizeBias
    from pore.bias.any_size_fitting import Levels


_LABELS = {
    "distance": "tokens from the visual token to the last one",
    "raster": "how far into the image, in reading order",
    "row": "row, from top (0) to bottom (1)",
    "column": "column, from left (0) to right (1)",
}


def any_size(levels: Levels, bias: AnySizeBias, *, narrow: bool = False) -> Figure:
    """Mean attention by bin, for images of every size, and the curve fitted to all of them.

    Every size is drawn relative to its own level, which the fit leaves free, so that dots of
    different sizes lie on one curve where the bias is of no size.

    Args:
        levels: The attention by bin and size, over the coordinate of `bias`.
        bias: P.
        narrow: Whether it is for a phone, with the panels one below the other.

    Returns:
        The figure, with a panel for every axis.

    Raises:
        ScoreError: No attention was measured.
        PoreError: matplotlib is not installed.
    """
    curves = curves_of(levels, bias.over)
    level, _ = product(levels.mean, levels.tokens)
    with style():
        from matplotlib import colormaps
        from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

        colors = colormaps["cividis"](np.linspace(0.0, 0.85, len(level)))
        figure, axes = panels(len(curves), (7.6, 3.4), narrow)
        for panel, curve, axis in zip(axes, curves, bias.axes, strict=True):
            points = curve.points
            for number, color in enumerate(colors):
                mean, tokens = levels.mean[number] / level[number], levels.tokens[number]
                mean, tokens = _along(curve.name, levels.bins, mean, tokens)
                seen = tokens > 0
                panel.plot(
                    *(points.at[seen], mean[seen]),
                    ls="",
                    marker="o",
                    ms=3.2,
                    color=color,
                    alpha=0.8,
                    label=_size(int(levels.sizes[number])),
                )
            fit = axis(axis.at.new_tensor(points.at)).numpy()
            fit = fit * curve.attention.mean() / fit.mean()
            panel.plot(
                points.at, fit, color=VERMILION, lw=2.0, label=f"P ({for_figure(bias.kind)})"
            )
            panel.axhline(1.0, color=GREY, lw=1.0, ls=(0, (4, 3)))
            if points.logarithmic:
                panel.set_xscale("log")
                panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.xaxis.set_major_formatter(ScalarFormatter())
                panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set_ylim(bottom=0.0)
            panel.set_xlabel(_LABELS[curve.name])
            panel.set_title(for_figure(f"P over the {curve.name} spans {_span(fit):.3g}-fold"))
        axes[0].set_ylabel("attention, relative to its mean")
        axes[-1].legend(loc="best")
    return figure


def _along(
    axis: str,
    bins: npt.NDArray[np.int_],
    mean: npt.NDArray[np.float64],
    tokens: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The mean attention at the points of an axis, and how many tokens it is of."""
    if axis not in ("row", "column"):
        return mean, tokens
    side = bins // SIDE if axis == "row" else bins % SIDE
    _, at = np.unique(side, return_inverse=True)
    count = np.bincount(at, tokens).astype(np.float64)
    return np.bincount(at, tokens * mean) / np.maximum(count, 1), count


def _span(curve: npt.NDArray[np.float64]) -> float:
    return float(curve.max() / curve.min())


def _size(half_octave: int) -> str:
    """A class of sizes in words."""
    least, beyond = (math.ceil(2 ** (half_octave / 2 + more) - 1e-9) for more in (0, 0.5))
    return f"{least} to {beyond - 1} tokens" if beyond - 1 > least else f"{least} tokens"
