"""Which part of a picture every visual token shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pore._text import for_figure
from pore.errors import InputError
from pore.plotting.kept import LONGEST, Merges, averaged, hatch, kept_mask, tell_merges
from pore.plotting.style import BLACK, BLUE, GREY, VERMILION, style, title_over

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from pore.data.coverage import Coverage


# The side of a square panel, in inches.
_SIDE = 2.6


@dataclass(frozen=True)
class Seen:
    """A picture of a prompt, and what is kept of it.

    Attributes:
        picture: The picture.
        coverage: What `pore.data.coverage.coverage_of` gives for it.
        kept: For every image of `coverage`, the raster indices of the tokens that stay, as in
            `ImageReport.kept`; None for all.
        caption: Which picture it is; needed where there are several.
        merges: Which of the tokens that do not stay were merged into those that do, as in
            `Pruner.merges`; None where they were dropped.
        extra: How many tokens besides stand for no single patch.
        averaged: (rows, columns) of the grid that an image of one view was averaged on, which is
            then drawn in place of kept tokens; None where it was not.
    """

    picture: Image
    coverage: Sequence[Coverage]
    kept: Sequence[Sequence[int]] | None = None
    caption: str | None = None
    merges: Merges | None = None
    extra: int = 0
    averaged: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Panel:
    """Views of a picture that lie side by side.

    Attributes:
        frames: (V, 4) the boxes of the views.
        cells: (n, 4) the boxes of their tokens.
        kept: (n,) bool, which of these stay.
        span: Left, top, right and bottom of what is drawn, in pixels of the picture.
        size: Width and height in inches.
    """

    frames: npt.NDArray[np.float64]
    cells: npt.NDArray[np.float64]
    kept: npt.NDArray[np.bool_]
    span: tuple[float, float, float, float]
    size: npt.NDArray[np.float64]


def layout(
    picture: Image,
    coverage: Sequence[Coverage],
    kept: Sequence[Sequence[int]] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Which part of a picture every visual token shows, drawn over it.

    Views that lie side by side, such as tiles, share a panel. A view that overlaps others, such as
    the whole picture at low resolution, has its own panel. Padding is hatched, and parts that no
    token shows are pale. A picture that is much longer than wide is stretched.

    Args:
        picture: The picture.
        coverage: What `pore.data.coverage.coverage_of` gives for it.
        kept: For every image of `coverage`, the raster indices of the tokens that stay, as in
            `ImageReport.kept`; None for all.
        title: Title of the whole figure.

    Returns:
        The figure.

    Raises:
        InputError: `coverage` is empty or belongs to a picture of another size, or `kept` does not
            fit it.
        PoreError: matplotlib is not installed.
    """
    return layouts([Seen(picture, coverage, kept)], title=title)


def layouts(pictures: Sequence[Seen], *, title: str | None = None) -> Figure:
    """The same for the pictures of one prompt, one below the other.

    Args:
        pictures: One or more pictures.
        title: Title of the whole figure.

    Returns:
        The figure.

    Raises:
        InputError: As in `layout`, or there is no picture.
        PoreError: matplotlib is not installed.
    """
    if not pictures:
        raise InputError("There are no pictures to draw.")
    rows = [_panels_of(seen) for seen in pictures]
    heights = [max(panel.size[1] for panel in row) + 0.75 for row in rows]
    widths = [sum(panel.size[0] + 0.25 for panel in row) for row in rows]
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(max(widths), sum(heights)), layout="constrained")
        parts: Any = [figure]
        if len(rows) > 1:
            parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
        for part, seen, row, width in zip(parts, pictures, rows, widths, strict=True):
            ratios = [float(panel.size[0]) for panel in row]
            spare = max(widths) - width  # to the right of a narrower picture than the widest
            if spare > 0.5:
                ratios.append(spare)
            axes = part.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
            for axis, panel in zip(axes, row, strict=False):
                _draw(axis, seen, panel)
            for axis in axes[len(row) :]:
                axis.set_visible(False)
            if seen.caption is not None:
                axes[0].set_title(
                    for_figure(seen.caption, 40, 2), fontsize=8.5, fontweight="normal"
                )
        shown = (seen for seen in pictures if seen.kept is not None and seen.averaged is None)
        tell_merges(figure, {seen.merges for seen in shown})
        if title is not None:
            title_over(figure, title, 9)
    return figure


def _panels_of(seen: Seen) -> list[_Panel]:
    """The panels of a picture."""
    (width, height), coverage, kept = seen.picture.size, seen.coverage, seen.kept
    boxes, masks = [], []
    if not coverage:
        raise InputError("The picture has no coverage, so there are no visual tokens to draw.")
    if kept is not None and len(kept) != len(coverage):
        raise InputError(f"There are {len(coverage)} images, but `kept` has {len(kept)} entries.")
    for i, image in enumerate(coverage):
        if image.size != (width, height):
            raise InputError(
                f"The coverage is of a picture of {image.size}, not {seen.picture.size}."
            )
        own = image.boxes.numpy()
        mask = (
            np.ones(len(own), dtype=bool) if kept is None else kept_mask(kept[i], (1, len(own)))[0]
        )
        for view in range(len(image.frames)):
            chosen = (image.views == view).numpy() & ~np.isnan(own).any(1)
            boxes.append(own[chosen])
            masks.append(mask[chosen])
    frames = np.concatenate([image.frames.numpy() for image in coverage])
    panels = []
    for layer in layers_of(frames):
        left, top = np.minimum(frames[layer, :2].min(0), 0)
        right, bottom = np.maximum(frames[layer, 2:].max(0), (width, height))
        shape = np.clip((right - left) / (bottom - top), 1 / LONGEST, LONGEST)
        panels.append(
            _Panel(
                frames=frames[layer],
                cells=np.concatenate([boxes[view] for view in layer]),
                kept=np.concatenate([masks[view] for view in layer]),
                span=(left, top, right, bottom),
                size=_SIDE * np.sqrt([shape, 1 / shape]),
            )
        )
    if not panels:
        raise InputError("No visual token covers any of the picture.")
    return panels


def _draw(axis: Axes, seen: Seen, panel: _Panel) -> None:
    """Draw a panel and what it shows in words."""
    left, top, right, bottom = panel.span
    scale = panel.size / (right - left, bottom - top)
    if seen.averaged is not None:
        _mean(axis, seen.picture, panel.frames[0], seen.averaged)
    else:
        _layer(axis, seen.picture, panel.frames, panel.cells, panel.kept, scale)
        if seen.merges is not None:
            hatch(axis, panel.cells[~panel.kept])
    axis.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
    axis.set_aspect(scale[1] / scale[0])
    total = panel.kept.size
    count = f"{total}" if seen.kept is None else f"{panel.kept.sum()} of {total}"
    views = f"{len(panel.frames)} tiles" if len(panel.frames) > 1 else "one view"
    below = f"{views}, {count} tokens"
    if seen.averaged is not None:
        rows, columns = seen.averaged
        below = f"{total} tokens averaged to {rows}×{columns} = {rows * columns}"
    elif seen.extra:
        below += f", and {seen.extra} of no single patch"
    axis.set_xlabel(below, fontsize=7.5, color=GREY)
    axis.spines[:].set_visible(False)


def _mean(
    axis: Axes, picture: Image, frame: npt.NDArray[np.float64], grid: tuple[int, int]
) -> None:
    """Draw the part of a picture that a view shows, averaged on a grid."""
    left, top, right, bottom = frame
    rows, columns = grid
    box = (round(left), round(top), round(right), round(bottom))
    shown = averaged(np.asarray(picture.convert("RGB").crop(box)), grid)
    axis.imshow(shown, extent=(left, right, bottom, top), zorder=1, interpolation="nearest")
    lines: dict[str, Any] = {"colors": BLUE, "linewidths": 0.5, "zorder": 3}
    axis.vlines(np.linspace(left, right, columns + 1), top, bottom, **lines)
    axis.hlines(np.linspace(top, bottom, rows + 1), left, right, **lines)


def layers_of(frames: npt.NDArray[np.float64]) -> list[list[int]]:
    """Group views, given as boxes (V, 4), that lie side by side: the numbers of every group."""
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
    """Whether a view overlaps one of some others by more than the uncertainty of their edges."""
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
    """Draw a picture with its padding, views and tokens, at a scale of inches per pixel."""
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
    # Parts that no kept token shows stay pale.
    over.set_clip_path(_union(cells[kept]), axis.transData)
    over.set_visible(bool(kept.any()))
    points = 72 * scale * (cells[:, 2:] - cells[:, :2])
    fine = float(np.clip(np.median(points) / 12, 0.1, 1)) if len(cells) else 1.0
    for color, line in (("white", 0.6), (BLACK, 0.25)):  # visible on dark and on light pixels
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
                _rim(corners[kept]), colors=BLUE, linewidths=max(0.9 * fine, 0.3), zorder=4
            )
        )
    for left, top, right, bottom in frames:
        sides = (right - left, bottom - top)
        axis.add_patch(
            Rectangle((left, top), *sides, fc="none", ec=VERMILION, lw=1.1, zorder=5, clip_on=False)
        )


def _union(boxes: npt.NDArray[np.float64]) -> Any:
    """The path around boxes."""
    from matplotlib.path import Path

    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3], [0, 1]]].reshape(-1, 2)
    return Path(corners, codes * len(boxes))


def _rim(corners: npt.NDArray[np.float64]) -> list[Any]:
    """The sides of boxes (n, 4, 2) that belong to one box only."""
    sides: dict[Any, Any] = {}
    for box in corners:
        for a, b in zip(box, np.roll(box, -1, axis=0), strict=True):
            name = tuple(sorted((tuple(np.round(a, 3)), tuple(np.round(b, 3)))))
            if sides.pop(name, None) is None:
                sides[name] = (a, b)
    return list(sides.values())
