"""The tokens that methods keep of an image, drawn over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pore._text import for_figure
from pore.errors import InputError
from pore.plotting.style import BLACK, BLUE, GREEN, GREY, VERMILION, style, title_over

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image


Merges = Literal["all", "some"]
"""Which of the tokens that do not stay were merged into those that do; see `Pruner.merges`."""

_HATCH = "\\\\\\"  # padding is hatched the other way

# The longest side of a panel is at most this many times the other.
LONGEST = 6.0


@dataclass(frozen=True)
class Panel:
    """What one method keeps of an image.

    Attributes:
        caption: The method and its answer.
        right: Whether the answer is right; None if that is not known.
        kept: Raster indices of the visual tokens that stay.
        extra: Number of further tokens, which stand for no single patch.
        cells: (height, width) of the coarse grid of a method that averages instead of dropping.
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
    """The image, and next to it what each method keeps of it.

    Args:
        image: The image as the model sees it.
        panels: One for each method.
        grid: Rows and columns of the visual tokens.
        title: Title of the whole figure, such as the question.

    Returns:
        The figure.

    Raises:
        InputError: An index lies outside the grid, there is no grid or no image, or a coarse grid
            has more cells than the image has pixels.
        PoreError: matplotlib is not installed.
    """
    if min(grid) < 1:
        raise InputError(f"There is nothing to draw on a grid of {grid[0]}×{grid[1]}.")
    pixels = pixels_of(image)
    shape = float(np.clip(pixels.shape[0] / pixels.shape[1], 1 / LONGEST, LONGEST))
    captions = [for_figure(panel.caption, 28, 3) for panel in panels]
    room = 0.85 + 0.16 * max((caption.count("\n") for caption in captions), default=0)
    with style():
        from matplotlib.figure import Figure

        count = len(panels) + 1
        side = 2.05
        figure = Figure(figsize=(side * count + 0.2, side * shape + room), layout="constrained")
        axes = figure.subplots(1, count, squeeze=False)[0]
        # In the shape of the image, unless that is much longer than wide.
        place: Any = {"extent": (0, grid[1], grid[0], 0), "aspect": shape * grid[1] / grid[0]}
        axes[0].imshow(pixels, **place)
        axes[0].set_title("image", fontsize=8.5, loc="center", fontweight="normal")
        for axis, panel, caption in zip(axes[1:], panels, captions, strict=True):
            if panel.cells is not None:
                shown = averaged(pixels, panel.cells)
                below = f"averaged to {panel.cells[0]}×{panel.cells[1]}"
            else:
                mask = kept_mask(panel.kept, grid)
                shown = dimmed(pixels, mask)
                below = f"{mask.sum()} of {mask.size} tokens"
                if panel.extra:
                    below += f", {panel.extra} of no one patch"
                outline(axis, mask)
            axis.imshow(shown, **place)
            axis.set_xlabel(below, fontsize=7.5, color=GREY)
            color, sign = BLACK, ""
            if panel.right is not None:
                color, sign = (GREEN, "  ✓") if panel.right else (VERMILION, "  ✗")
            axis.set_title(
                caption + sign,
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
            title_over(figure, title, 10)
    return figure


def kept_mask(kept: Sequence[int], grid: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """A mask on the grid, True where a token is kept."""
    mask = np.zeros(grid[0] * grid[1], dtype=bool)
    indices = np.asarray(list(kept), dtype=int)
    if indices.size and not 0 <= indices.min() <= indices.max() < mask.size:
        raise InputError(f"A kept token lies outside the grid of {grid[0]}×{grid[1]}.")
    mask[indices] = True
    return mask.reshape(grid)


def pixels_of(image: Image | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """An image as (height, width, 3) pixels."""
    pixels = np.asarray(image if isinstance(image, np.ndarray) else image.convert("RGB"))
    if pixels.ndim != 3 or pixels.shape[2] < 3 or 0 in pixels.shape or pixels.dtype != np.uint8:
        raise InputError(
            "An image must be a Pillow image or an array of uint8 of shape "
            f"(height, width, 3), not {pixels.dtype} of shape {pixels.shape}."
        )
    return pixels[..., :3]


def dimmed(pixels: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """An image (height, width, 3) with dropped patches nearly white."""
    rows = np.arange(pixels.shape[0]) * mask.shape[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * mask.shape[1] // pixels.shape[1]
    kept = mask[rows[:, None], columns[None]][..., None]
    faded = 255 - 0.16 * (255 - pixels.astype(np.float64))
    return np.where(kept, pixels, faded).astype(np.uint8)


def averaged(pixels: npt.NDArray[np.uint8], grid: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """The image averaged over the cells of a coarse grid."""
    if not (1 <= grid[0] <= pixels.shape[0] and 1 <= grid[1] <= pixels.shape[1]):
        height, width = pixels.shape[:2]
        raise InputError(
            f"An image of {height}×{width} pixels has no averages on a grid of {grid[0]}×{grid[1]}."
        )
    rows = np.linspace(0, pixels.shape[0], grid[0] + 1).round().astype(int)
    columns = np.linspace(0, pixels.shape[1], grid[1] + 1).round().astype(int)
    sums = np.add.reduceat(
        np.add.reduceat(pixels.astype(np.float64), rows[:-1], 0), columns[:-1], 1
    )
    areas = np.diff(rows)[:, None, None] * np.diff(columns)[None, :, None]
    means: npt.NDArray[np.uint8] = (sums / areas).astype(np.uint8)
    return means


def outline(axis: Axes, mask: npt.NDArray[np.bool_]) -> None:
    """Lines around the kept tokens."""
    from matplotlib.collections import LineCollection

    padded = np.pad(mask, 1)
    across = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])
    down = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    lines = [((c, r), (c + 1, r)) for r, c in across.tolist()]
    lines += [((c, r), (c, r + 1)) for r, c in down.tolist()]
    axis.add_collection(LineCollection(lines, colors=BLUE, linewidths=0.9, clip_on=False))


def hatch(axis: Axes, boxes: npt.NDArray[Any]) -> None:
    """Hatch tokens that were merged into others, given as boxes (n, 4)."""
    from matplotlib.collections import PolyCollection

    corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    hatched = PolyCollection(
        list(corners), facecolors="none", edgecolors=BLUE, hatch=_HATCH, linewidths=0, zorder=3
    )
    axis.add_collection(hatched)


def tell_merges(figure: Figure, merges: set[Merges | None]) -> None:
    """Say below a figure what hatched tokens are, if there are any."""
    from matplotlib.patches import Patch

    told: dict[Merges, str] = {
        "all": "hatched: merged into tokens that stay",
        "some": "hatched: dropped, or merged into others",
    }
    handles = [
        Patch(fc="none", ec=BLUE, hatch=_HATCH, lw=0, label=label)
        for kind, label in told.items()
        if kind in merges
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower left", fontsize=7.5)
