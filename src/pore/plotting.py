"""The pictures: the position bias on the grid and over position, kept tokens, accuracy over FLOPs.

Figures are drawn without pyplot, so that no display is needed and no global state is left.
matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pore._files import write_atomic
from pore.errors import InputError, PoreError
from pore.evaluation.outcome import UNPRUNED, label

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from pore.bias import PositionBias

# Okabe and Ito's palette, told apart with any colour vision.
_BLACK, _ORANGE, _SKY, _GREEN = "#222222", "#E69F00", "#56B4E9", "#009E73"
_BLUE, _VERMILION, _PURPLE, _GREY = "#0072B2", "#D55E00", "#CC79A7", "#8A8A8A"
_CYCLE = (_BLUE, _VERMILION, _GREEN, _PURPLE, _ORANGE, _SKY, _BLACK)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelcolor": _BLACK,
    "ytick.labelcolor": _BLACK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
_Z95 = 1.96


@contextmanager
def _style() -> Iterator[None]:
    try:
        import matplotlib
    except ImportError as error:
        raise PoreError(
            "Drawing needs matplotlib; install it with: pip install 'pore-vlm[plot]'"
        ) from error
    with matplotlib.rc_context(_STYLE):
        yield


def to_png(figure: Figure, dpi: int = 200) -> bytes:
    """A figure as the bytes of a PNG.

    Args:
        figure: What a function of this module drew.
        dpi: Pixels per inch.

    Returns:
        The file's content.
    """
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.06)
    return buffer.getvalue()


def save(figure: Figure, path: str | os.PathLike[str], dpi: int = 200) -> Path:
    """Write a figure as a PNG, whole or not at all.

    Args:
        figure: What a function of this module drew.
        path: The file; missing folders are made.
        dpi: Pixels per inch.

    Returns:
        The path written.

    Raises:
        OSError: It cannot be written.
    """
    return write_atomic(path, to_png(figure, dpi))


def figure1(mean: npt.ArrayLike, bias: PositionBias, grid: tuple[int, int] | None = None) -> Figure:
    """Mean attention on the grid of the image, before and after reweighting (PoRe, Figure 1).

    Both maps are relative to their mean and share one scale. The mean of A / P over samples is
    Ā / P, because P is the same for all.

    Args:
        mean: Ā, of shape (N,): mean attention on every visual token.
        bias: P over the same N positions.
        grid: Rows and columns; those of `bias` if left out.

    Returns:
        The figure.

    Raises:
        InputError: The lengths differ, or no grid is known.
        PoreError: matplotlib is not installed.
    """
    before, after = _before_after(mean, bias)
    grid = grid or bias.grid
    if grid is None or grid[0] * grid[1] != len(before):
        raise InputError(f"A grid of {len(before)} visual tokens is needed to draw a map.")
    with _style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(7.6, 3.8), layout="constrained")
        axes = figure.subplots(1, 2)
        # The few highest cells may not flatten the picture of all the others.
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
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(6, integer=True))
            axis.spines[:].set_visible(False)
        axes[0].set_ylabel("row of visual tokens")
        assert image is not None
        extend = "max" if max(before.max(), after.max()) > top else "neither"
        bar = figure.colorbar(image, ax=list(axes), shrink=0.9, pad=0.02, extend=extend)
        bar.set_label("attention, relative to the mean")
        bar.outline.set_visible(False)
    return figure


def figure2(mean: npt.ArrayLike, bias: PositionBias, sem: npt.ArrayLike | None = None) -> Figure:
    """Mean attention over position, its fit, and what reweighting makes of it (PoRe, Figure 2).

    Args:
        mean: Ā, of shape (N,).
        bias: P over the same N positions.
        sem: Standard error of Ā, of shape (N,), for a band of ± 1.96 of them; None for no band.

    Returns:
        The figure.

    Raises:
        InputError: The lengths differ.
        PoreError: matplotlib is not installed.
    """
    before, after = _before_after(mean, bias)
    scale = float(np.asarray(mean, dtype=np.float64).mean())
    fit = bias.values.numpy()
    if bias.residuals is not None:
        # The fitted curve itself, where the fit knows its height.
        fit = (np.asarray(mean, dtype=np.float64) - bias.residuals.numpy()) / scale
    position = np.arange(len(before))
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.6, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        left.plot(position, before, color=_BLUE, lw=1.1, label="mean attention $\\bar{A}$")
        name = f"fit $P$ ({bias.kind})" + (
            f", $R^2$ = {bias.r2:.2f}" if bias.r2 is not None and bias.kind != "empirical" else ""
        )
        left.plot(position, fit, color=_VERMILION, lw=2.2, label=name)
        right.plot(position, after, color=_GREEN, lw=1.1, label="reweighted $\\bar{A} / P$")
        right.axhline(1.0, color=_GREY, lw=1.4, ls=(0, (4, 3)), label="no position favoured")
        top = float(max(before.max(), after.max()))
        if sem is not None:
            # The error relative to the mean is the same before and after a division by P.
            spread = _Z95 * _vector(sem, len(before)) / np.asarray(mean, dtype=np.float64)
            top = float(np.nanmax([top, *(before * (1 + spread)), *(after * (1 + spread))]))
            for axis, values, color in ((left, before, _BLUE), (right, after, _GREEN)):
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
            axis.set_xlabel("visual token, in raster order")
            axis.set_xlim(0, len(before) - 1)
            axis.legend(loc="upper left")
        left.set_ylim(0.0, 1.35 * top)
        left.set_ylabel("attention, relative to the mean")
    return figure


def accuracy_over_flops(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy of every method over the FLOPs it needs, with 95 % confidence intervals.

    Methods are shifted sideways by less than a marker, so that those of equal cost can be told
    apart.

    Args:
        records: Records of a `results.json`.

    Returns:
        The figure.

    Raises:
        InputError: No record says its FLOPs.
        PoreError: matplotlib is not installed.
    """
    known = [record for record in records if record["flops"] is not None]
    if not known:
        raise InputError("No result says its FLOPs, so there is nothing to draw accuracy over.")
    unpruned = [record for record in known if record["method"] == UNPRUNED]
    methods: dict[str, list[Mapping[str, Any]]] = {}
    for record in known:
        if record["method"] != UNPRUNED:
            methods.setdefault(label(record["method"], record["reweight"]), []).append(record)
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axis = figure.subplots()
        for record in unpruned:
            low, high = (100 * end for end in record["ci"])
            axis.axhspan(low, high, color=_GREY, alpha=0.18, lw=0)
            axis.axhline(100 * record["accuracy"], color=_GREY, lw=1.4, ls=(0, (4, 3)))
            _point(axis, [record], "unpruned", _BLACK, "*")
        costs = [record["flops"] / 1e9 for record in known]
        step = 0.007 * (max(costs) - min(costs))
        for i, (name, points) in enumerate(methods.items()):
            points = sorted(points, key=lambda record: record["flops"])
            color, marker = _CYCLE[i % len(_CYCLE)], _MARKERS[i % len(_MARKERS)]
            _point(axis, points, name, color, marker, (i - (len(methods) - 1) / 2) * step)
        axis.set_xlabel("FLOPs of the prefill, tower included (billions; multiply-add = 2)")
        axis.set_ylabel("accuracy (%)")
        axis.set_title("Accuracy over cost, with 95 % confidence")
        axis.grid(axis="y", color="#DDDDDD", lw=0.7)
        axis.set_axisbelow(True)
        axis.legend(loc="lower right")
    return figure


def _point(
    axis: Axes,
    records: Sequence[Mapping[str, Any]],
    name: str,
    color: str,
    marker: str,
    shift: float = 0.0,
) -> None:
    accuracy = np.array([100 * record["accuracy"] for record in records])
    ends = np.array([[100 * end for end in record["ci"]] for record in records])
    axis.errorbar(
        [record["flops"] / 1e9 + shift for record in records],
        accuracy,
        yerr=np.abs(ends.T - accuracy),
        label=name,
        color=color,
        marker=marker,
        markersize=5.5 if marker != "*" else 10,
        lw=1.5,
        elinewidth=0.9,
        capsize=2.5,
    )


@dataclass(frozen=True)
class Panel:
    """What one method makes of an image.

    Attributes:
        caption: The method, and what came of it.
        right: Whether the answer is right; None where that is not known.
        kept: Raster indices of the visual tokens that stay.
        extra: Tokens beside them that stand for no single patch.
        cells: For a method that averages instead, (height, width) of its coarse grid.
    """

    caption: str
    right: bool | None = None
    kept: Sequence[int] = ()
    extra: int = 0
    cells: tuple[int, int] | None = None


def kept_tokens(
    image: Image | npt.NDArray[np.uint8],
    panels: Sequence[Panel],
    grid: tuple[int, int],
    *,
    title: str | None = None,
) -> Figure:
    """What methods keep of an image, drawn over it, after the image itself.

    Args:
        image: The image as the model sees it.
        panels: One for each method.
        grid: Rows and columns of the visual tokens.
        title: Title above all, such as the question.

    Returns:
        The figure.

    Raises:
        InputError: An index is not on the grid.
        PoreError: matplotlib is not installed.
    """
    pixels = np.asarray(image)[..., :3]
    height, width = pixels.shape[:2]
    with _style():
        from matplotlib.figure import Figure

        count = len(panels) + 1
        side = 2.05
        figure = Figure(
            figsize=(side * count + 0.2, side * height / width + 0.85), layout="constrained"
        )
        axes = figure.subplots(1, count, squeeze=False)[0]
        axes[0].imshow(pixels, extent=(0, grid[1], grid[0], 0))
        axes[0].set_title("image", fontsize=8.5, loc="center", fontweight="normal")
        for axis, panel in zip(axes[1:], panels, strict=True):
            if panel.cells is not None:
                shown = _averaged(pixels, panel.cells)
                note = f"averaged to {panel.cells[0]}×{panel.cells[1]}"
            else:
                mask = _mask(panel.kept, grid)
                shown = _dimmed(pixels, mask)
                note = f"{mask.sum()} of {mask.size} tokens"
                if panel.extra:
                    note += f", {panel.extra} of no one patch"
                _outline(axis, mask)
            axis.imshow(shown, extent=(0, grid[1], grid[0], 0))
            axis.set_xlabel(note, fontsize=7.5, color=_GREY)
            color, sign = _BLACK, ""
            if panel.right is not None:
                color, sign = (_GREEN, "  ✓") if panel.right else (_VERMILION, "  ✗")
            axis.set_title(
                panel.caption + sign,
                fontsize=8.5,
                loc="center",
                color=color,
                fontweight="normal" if panel.right is None else "bold",
            )
        for axis in axes:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        if title is not None:
            figure.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    return figure


def _mask(kept: Sequence[int], grid: tuple[int, int]) -> npt.NDArray[np.bool_]:
    mask = np.zeros(grid[0] * grid[1], dtype=bool)
    indices = np.asarray(list(kept), dtype=int)
    if indices.size and not 0 <= indices.min() <= indices.max() < mask.size:
        raise InputError(f"A kept token lies outside the grid of {grid[0]}×{grid[1]}.")
    mask[indices] = True
    return mask.reshape(grid)


def _dimmed(pixels: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """The image with dropped patches nearly white."""
    rows = np.arange(pixels.shape[0]) * mask.shape[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * mask.shape[1] // pixels.shape[1]
    kept = mask[rows[:, None], columns[None]][..., None]
    faded = 255 - 0.16 * (255 - pixels.astype(np.float64))
    return np.where(kept, pixels, faded).astype(np.uint8)


def _averaged(pixels: npt.NDArray[np.uint8], grid: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """The image averaged over the cells of a coarse grid."""
    rows = np.linspace(0, pixels.shape[0], grid[0] + 1).round().astype(int)
    columns = np.linspace(0, pixels.shape[1], grid[1] + 1).round().astype(int)
    sums = np.add.reduceat(
        np.add.reduceat(pixels.astype(np.float64), rows[:-1], 0), columns[:-1], 1
    )
    areas = np.diff(rows)[:, None, None] * np.diff(columns)[None, :, None]
    averaged: npt.NDArray[np.uint8] = (sums / areas).astype(np.uint8)
    return averaged


def _outline(axis: Axes, mask: npt.NDArray[np.bool_]) -> None:
    """Lines around the kept tokens."""
    from matplotlib.collections import LineCollection

    padded = np.pad(mask, 1)
    across = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])
    down = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    lines = [((c, r), (c + 1, r)) for r, c in across.tolist()]
    lines += [((c, r), (c, r + 1)) for r, c in down.tolist()]
    axis.add_collection(LineCollection(lines, colors=_BLUE, linewidths=0.9, clip_on=False))


def _vector(values: npt.ArrayLike, n: int) -> npt.NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.shape != (n,):
        raise InputError(f"Expected {n} numbers, one per position, not {vector.shape}.")
    return vector


def _before_after(
    mean: npt.ArrayLike, bias: PositionBias
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Ā and Ā / P, each relative to its mean."""
    before = _vector(mean, len(bias))
    after = before / bias.values.numpy()
    return before / before.mean(), after / after.mean()
