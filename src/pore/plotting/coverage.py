"""Which part of a picture every visual token shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pore.errors import InputError
from pore.plotting.kept import LONGEST, kept_mask
from pore.plotting.style import BLACK, BLUE, GREY, VERMILION, style, title_over

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from pore.data.coverage import Coverage


# The side of a square panel, in inches.
_SIDE = 2.6


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
    width, height = picture.size
    boxes, masks = [], []
    if not coverage:
        raise InputError("The picture has no coverage, so there are no visual tokens to draw.")
    if kept is not None and len(kept) != len(coverage):
        raise InputError(f"There are {len(coverage)} images, but `kept` has {len(kept)} entries.")
    for i, image in enumerate(coverage):
        if image.size != (width, height):
            raise InputError(f"The coverage is of a picture of {image.size}, not {picture.size}.")
        own = image.boxes.numpy()
        mask = (
            np.ones(len(own), dtype=bool) if kept is None else kept_mask(kept[i], (1, len(own)))[0]
        )
        for view in range(len(image.frames)):
            chosen = (image.views == view).numpy() & ~np.isnan(own).any(1)
            boxes.append(own[chosen])
            masks.append(mask[chosen])
    frames = np.concatenate([image.frames.numpy() for image in coverage])
    layers = layers_of(frames)
    if not layers:
        raise InputError("No visual token covers any of the picture.")
    with style():
        from matplotlib.figure import Figure

        spans, sizes = [], []
        for layer in layers:
            left, top = np.minimum(frames[layer, :2].min(0), 0)
            right, bottom = np.maximum(frames[layer, 2:].max(0), (width, height))
            shape = np.clip((right - left) / (bottom - top), 1 / LONGEST, LONGEST)
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
            axis.set_xlabel(f"{views}, {count} tokens", fontsize=7.5, color=GREY)
            axis.spines[:].set_visible(False)
        if title is not None:
            title_over(figure, title, 9)
    return figure


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
