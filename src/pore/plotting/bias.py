"""Figures of the position bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pore._text import for_figure
from pore.errors import InputError
from pore.plotting.pixels import enlarged
from pore.plotting.style import BLUE, GREEN, GREY, VERMILION, panels, style

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.figure import Figure

    from pore.bias.position_bias import PositionBias


_Z95 = 1.96


def figure1(
    mean: npt.ArrayLike,
    bias: PositionBias,
    grid: tuple[int, int] | None = None,
    *,
    narrow: bool = False,
) -> Figure:
    """Mean attention on the grid of the image, before and after reweighting (PoRe, Figure 1).

    Both maps are relative to their mean and share one scale. The mean of A / P over samples is
    Ā / P, because P is the same for all.

    Args:
        mean: Ā, of shape (N,): mean attention on every visual token.
        bias: P over the same N positions.
        grid: Rows and columns; by default those of `bias`.
        narrow: Whether it is for a phone, with the maps one below the other.

    Returns:
        The figure.

    Raises:
        InputError: The lengths differ, `mean` is not a mean of attention, or no grid is known.
        PoreError: matplotlib is not installed.
    """
    before, after = _before_after(mean, bias)
    grid = grid or bias.grid
    if grid is None or min(grid) < 1 or grid[0] * grid[1] != len(before):
        raise InputError(f"A grid of {len(before)} visual tokens is needed to draw a map.")
    with style():
        from matplotlib.ticker import MaxNLocator

        figure, axes = panels(2, (7.6, 3.2 if narrow else 3.8), narrow)
        # The few highest cells must not make all other cells look the same.
        top = float(np.quantile(np.concatenate([before, after]), 0.995))
        image = None
        for axis, values, title in zip(
            axes, (before, after), ("Before: mean attention", "After: divided by P"), strict=True
        ):
            image = axis.imshow(
                values.reshape(grid), cmap="cividis", vmin=0.0, vmax=top, interpolation="nearest"
            )
            axis.set_title(title)
            axis.set_xlabel("column of visual tokens")
            axis.set_ylabel("row, from the top of the image")
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(6, integer=True))
            axis.spines[:].set_visible(False)
        assert image is not None
        extend = "max" if max(before.max(), after.max()) > top else "neither"
        bar = figure.colorbar(image, ax=list(axes), shrink=0.9, pad=0.02, extend=extend)
        bar.set_label("attention, relative to the mean")
        bar.outline.set_visible(False)
    return figure


def figure2(
    mean: npt.ArrayLike,
    bias: PositionBias,
    sem: npt.ArrayLike | None = None,
    *,
    narrow: bool = False,
) -> Figure:
    """Mean attention over position, its fit, and the result of reweighting (PoRe, Figure 2).

    Args:
        mean: Ā, of shape (N,).
        bias: P over the same N positions.
        sem: Standard error of Ā, of shape (N,), for a band of ± 1.96 times it; None for no band.

    Returns:
        The figure.

    Raises:
        InputError: The lengths differ, or `mean` or `sem` holds what attention cannot have.
        PoreError: matplotlib is not installed.
    """
    before, after = _before_after(mean, bias)
    scale = float(np.asarray(mean, dtype=np.float64).mean())
    fit = bias.values.numpy()
    if bias.residuals is not None:
        # The fitted curve itself, if the fit knows its height.
        fit = (np.asarray(mean, dtype=np.float64) - bias.residuals.numpy()) / scale
    position = np.arange(len(before))
    with style():
        figure, (left, right) = panels(2, (7.6, 3.4), narrow, sharey=True)
        left.plot(position, before, color=BLUE, lw=1.1, label="mean attention Ā")
        name = f"fit P ({for_figure(bias.kind)})" + (
            f", R² = {bias.r2:.2f}" if bias.r2 is not None and bias.kind != "empirical" else ""
        )
        left.plot(position, fit, color=VERMILION, lw=2.2, label=name)
        right.plot(position, after, color=GREEN, lw=1.1, label="reweighted Ā / P")
        right.axhline(1.0, color=GREY, lw=1.4, ls=(0, (4, 3)), label="no position favoured")
        top = float(max(before.max(), after.max()))
        if sem is not None:
            # The error relative to the mean is the same before and after a division by P.
            spread = _relative(_Z95 * _vector(sem, len(before)), mean)
            top = float(np.nanmax([top, *(before * (1 + spread)), *(after * (1 + spread))]))
            for axis, values, color in ((left, before, BLUE), (right, after, GREEN)):
                axis.fill_between(
                    position,
                    values * (1 - spread),
                    values * (1 + spread),
                    color=color,
                    alpha=0.22,
                    lw=0,
                    label="95 % confidence of the mean",
                )
        left.set_title(f"Before: P of last over first = {bias.growth:.2f}")
        right.set_title("After")
        for axis in (left, right):
            axis.set_xlabel("visual token, from top left to bottom right")
            axis.set_xlim(0, max(len(before) - 1, 1))
            axis.legend(loc="upper left")
        left.set_ylim(0.0, 1.35 * top)
        left.set_ylabel("attention, relative to the mean")
    return figure


def maps(mean: npt.ArrayLike, bias: PositionBias) -> tuple[bytes, bytes] | None:
    """The maps of `figure1` as two PNGs alone; None where P has no grid.

    Args:
        mean: Ā, of shape (N,).
        bias: P over the same N positions.

    Raises:
        InputError: As `figure1`.
        PoreError: matplotlib is not installed.
    """
    if bias.grid is None:
        return None
    both = _before_after(mean, bias)
    top = float(np.quantile(np.concatenate(both), 0.995))
    with style():
        from matplotlib import colormaps

        before, after = (
            enlarged(
                (255 * colormaps["cividis"](one.reshape(bias.grid) / top)[..., :3]).astype("uint8")
            )
            for one in both
        )
    return before, after


def _vector(values: npt.ArrayLike, n: int) -> npt.NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.shape != (n,):
        raise InputError(f"Expected {n} numbers, one per position, not {vector.shape}.")
    if np.isinf(vector).any() or (vector < 0).any():
        raise InputError("Attention and its standard errors are finite and not negative.")
    return vector


def _before_after(
    mean: npt.ArrayLike, bias: PositionBias
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Ā and Ā / P, each relative to its mean."""
    before = _vector(mean, len(bias))
    if np.isnan(before).any():
        raise InputError("The mean attention holds NaN, so there is nothing to draw.")
    if not before.any():
        raise InputError("The mean attention is zero everywhere, so there is nothing to draw.")
    before = before / before.max()  # so that the sum neither overflows nor vanishes
    after = before / bias.values.numpy()
    return before / before.mean(), after / after.mean()


def _relative(error: npt.NDArray[np.float64], mean: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Errors relative to their means; 0 where the mean is 0."""
    values = np.asarray(mean, dtype=np.float64)
    return np.divide(error, values, out=np.zeros_like(error), where=values > 0)
