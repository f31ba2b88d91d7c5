"""Which tokens were kept, over the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pore._text import for_figure
from pore.errors import InputError
from pore.plotting.accuracy import _pixels, _title
from pore.plotting.style import _BLACK, _BLUE, _GREEN, _GREY, _VERMILION, _mask, _style

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from pore.data.coverage import Coverage


# A panel is drawn at most so many times as long as wide.
_LONGEST = 6.0


# The side of a square panel, in inches.
_SIDE = 2.6


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
        InputError: An index is not on the grid, there is no grid or no image, or a coarse grid is
            finer than its pixels.
        PoreError: matplotlib is not installed.
    """
    if min(grid) < 1:
        raise InputError(f"There is nothing to draw on a grid of {grid[0]}×{grid[1]}.")
    pixels = _pixels(image)
    shape = float(np.clip(pixels.shape[0] / pixels.shape[1], 1 / _LONGEST, _LONGEST))
    captions = [for_figure(panel.caption, 28, 3) for panel in panels]
    room = 0.85 + 0.16 * max((caption.count("\n") for caption in captions), default=0)
    with _style():
        from matplotlib.figure import Figure

        count = len(panels) + 1
        side = 2.05
        figure = Figure(figsize=(side * count + 0.2, side * shape + room), layout="constrained")
        axes = figure.subplots(1, count, squeeze=False)[0]
        # As long as the image, but for one that is much longer than wide.
        place: Any = {"extent": (0, grid[1], grid[0], 0), "aspect": shape * grid[1] / grid[0]}
        axes[0].imshow(pixels, **place)
        axes[0].set_title("image", fontsize=8.5, loc="center", fontweight="normal")
        for axis, panel, caption in zip(axes[1:], panels, captions, strict=True):
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
            axis.imshow(shown, **place)
            axis.set_xlabel(note, fontsize=7.5, color=_GREY)
            color, sign = _BLACK, ""
            if panel.right is not None:
                color, sign = (_GREEN, "  ✓") if panel.right else (_VERMILION, "  ✗")
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
            _title(figure, title, 10)
    return figure


def layout(
    picture: Image,
    coverage: Sequence[Coverage],
    kept: Sequence[Sequence[int]] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Which part of a picture every visual token shows, drawn over it.

    Views that lie side by side, such as tiles, share a panel; those that overlap, such as the whole
    picture at low resolution, have panels of their own. Padding is hatched, and what no token shows
    is pale. A picture much longer than wide is stretched.

    Args:
        picture: The picture.
        coverage: What `pore.data.coverage.coverage_of` found for it.
        kept: For every image of `coverage`, the raster indices of the tokens that stay, as in
            `ImageReport.kept`; None for all.
        title: Title above all.

    Returns:
        The figure.

    Raises:
        InputError: `coverage` is empty or of a picture of another size, or `kept` does not fit it.
        PoreError: matplotlib is not installed.
    """
    width, height = picture.size
    boxes, masks = [], []
    if not coverage:
        raise InputError("The picture has no coverage, so there are no visual tokens to draw.")
    if kept is not None and len(kept) != len(coverage):
        raise InputError(f"There are {len(coverage)} images, but tokens kept of {len(kept)}.")
    for i, image in enumerate(coverage):
        if image.size != (width, height):
            raise InputError(f"The coverage is of a picture of {image.size}, not {picture.size}.")
        own = image.boxes.numpy()
        mask = np.ones(len(own), dtype=bool) if kept is None else _mask(kept[i], (1, len(own)))[0]
        for view in range(len(image.frames)):
            chosen = (image.views == view).numpy() & ~np.isnan(own).any(1)
            boxes.append(own[chosen])
            masks.append(mask[chosen])
    frames = np.concatenate([image.frames.numpy() for image in coverage])
    layers = _layers(frames)
    if not layers:
        raise InputError("No visual token covers any of the picture.")
    with _style():
        from matplotlib.figure import Figure

        spans, sizes = [], []
        for layer in layers:
            left, top = np.minimum(frames[layer, :2].min(0), 0)
            right, bottom = np.maximum(frames[layer, 2:].max(0), (width, height))
            shape = np.clip((right - left) / (bottom - top), 1 / _LONGEST, _LONGEST)
            spans.append((left, top, right, bottom))
            sizes.append(_SIDE * np.sqrt([shape, 1 / shape]))
        across, down = np.sum(sizes, 0)[0], np.max(sizes, 0)[1]
        figure = Figure(figsize=(across + 0.25 * len(layers), down + 0.75), layout="constrained")
        axes = figure.subplots(
            1, len(layers), squeeze=False, width_ratios=[float(size[0]) for size in sizes]
        )[0]
        for axis, layer, span, size in zip(axes, layers, spans, sizes, strict=True):
            cells = np.concatenate([boxes[view] for view in layer])
            mask = np.concatenate([masks[view] for view in layer])
            left, top, right, bottom = span
            scale = size / (right - left, bottom - top)
            _layer(axis, picture, frames[layer], cells, mask, scale)
            axis.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
            axis.set_aspect(scale[1] / scale[0])
            count = f"{mask.sum()} of {mask.size}" if kept is not None else f"{mask.size}"
            views = f"{len(layer)} tiles" if len(layer) > 1 else "one view"
            axis.set_xlabel(f"{views}, {count} tokens", fontsize=7.5, color=_GREY)
            axis.spines[:].set_visible(False)
        if title is not None:
            _title(figure, title, 9)
    return figure


def _layers(frames: npt.NDArray[np.float64]) -> list[list[int]]:
    """Put views together that lie side by side."""
    layers: list[list[int]] = []
    for view, frame in enumerate(frames):
        if not np.isnan(frame).any():
            free = (one for one in layers if not _overlap(frames[one], frame))
            layer = next(free, None)
            if layer is None:
                layers.append([view])
            else:
                layer.append(view)
    return layers


def _overlap(frames: npt.NDArray[np.float64], frame: npt.NDArray[np.float64]) -> bool:
    """Whether a view lies over one of some others, and by more than their edges are known to."""
    sides = np.minimum(frames[:, 2:], frame[2:]) - np.maximum(frames[:, :2], frame[:2])
    least = np.minimum(frames[:, 2:] - frames[:, :2], frame[2:] - frame[:2])
    return bool((sides > 0.05 * least).all(1).any())


def _layer(
    axis: Axes,
    picture: Image,
    frames: npt.NDArray[np.float64],
    cells: npt.NDArray[np.float64],
    kept: npt.NDArray[np.bool_],
    scale: npt.NDArray[np.float64],
) -> None:
    """A picture with its padding, views and tokens, at a scale of inches per pixel."""
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.patches import Rectangle

    width, height = picture.size
    for left, top, right, bottom in frames:
        corner, sides = (left, top), (right - left, bottom - top)
        axis.add_patch(
            Rectangle(corner, *sides, fc="#F2F2F2", ec="#C8C8C8", hatch="////", lw=0, zorder=0)
        )
    shown = picture.copy()
    shown.thumbnail((1400, 1400))
    pixels = np.asarray(shown.convert("RGB"))
    pale = (255 - 0.25 * (255 - pixels.astype(np.float64))).astype(np.uint8)
    place = (0, width, height, 0)
    axis.imshow(pale, extent=place, zorder=1, interpolation="nearest")
    over = axis.imshow(pixels, extent=place, zorder=2, interpolation="nearest")
    corners = cells[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    # What no kept token shows stays pale.
    over.set_clip_path(_union(cells[kept]), axis.transData)
    over.set_visible(bool(kept.any()))
    points = 72 * scale * (cells[:, 2:] - cells[:, :2])
    fine = float(np.clip(np.median(points) / 12, 0.1, 1)) if len(cells) else 1.0
    for color, line in (("white", 0.6), (_BLACK, 0.25)):  # to be seen on dark and on light
        outlines = PolyCollection(
            list(corners[kept]),
            facecolors="none",
            edgecolors=color,
            linewidths=fine * line,
            alpha=0.45,
        )
        outlines.set_zorder(3)
        axis.add_collection(outlines)
    if not kept.all():
        axis.add_collection(
            LineCollection(
                _rim(corners[kept]), colors=_BLUE, linewidths=max(0.9 * fine, 0.3), zorder=4
            )
        )
    for left, top, right, bottom in frames:
        sides = (right - left, bottom - top)
        axis.add_patch(
            Rectangle(
                (left, top), *sides, fc="none", ec=_VERMILION, lw=1.1, zorder=5, clip_on=False
            )
        )


def _union(boxes: npt.NDArray[np.float64]) -> Any:
    """A path around boxes."""
    from matplotlib.path import Path

    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3], [0, 1]]].reshape(-1, 2)
    return Path(corners, codes * len(boxes))


def _rim(corners: npt.NDArray[np.float64]) -> list[Any]:
    """The sides of boxes (n, 4, 2) that no two of them share."""
    sides: dict[Any, Any] = {}
    for box in corners:
        for a, b in zip(box, np.roll(box, -1, axis=0), strict=True):
            name = tuple(sorted((tuple(np.round(a, 3)), tuple(np.round(b, 3)))))
            if sides.pop(name, None) is None:
                sides[name] = (a, b)
    return list(sides.values())


def _dimmed(pixels: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """The image with dropped patches nearly white."""
    rows = np.arange(pixels.shape[0]) * mask.shape[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * mask.shape[1] // pixels.shape[1]
    kept = mask[rows[:, None], columns[None]][..., None]
    faded = 255 - 0.16 * (255 - pixels.astype(np.float64))
    return np.where(kept, pixels, faded).astype(np.uint8)


def _averaged(pixels: npt.NDArray[np.uint8], grid: tuple[int, int]) -> npt.NDArray[np.uint8]:
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
