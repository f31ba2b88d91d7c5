"""The attention on the visual tokens of one picture, before and after a correction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pore._text import for_figure
from pore.errors import InputError
from pore.plotting.coverage import layers_of
from pore.plotting.kept import LONGEST
from pore.plotting.style import style

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.figure import Figure

    from pore.data.coverage import Coverage

_SIDE = 2.6  # of a square panel, in inches


def attention(
    coverage: Sequence[Coverage], maps: Mapping[str, Sequence[npt.ArrayLike]], *, unit: str
) -> Figure:
    """Attention where the visual tokens lie in a picture: a column for every map.

    Every map is relative to its mean, and all share one scale; what is below 0 is drawn as 0. Views
    that lie side by side, such as tiles, share a panel, and others have a row of their own.

    Args:
        coverage: What `pore.data.coverage.coverage_of` gives for the picture.
        maps: By title, for every image of `coverage`, (n,) numbers of its tokens in the order of
            their raster indices.
        unit: What the numbers are, for the scale.

    Returns:
        The figure.

    Raises:
        InputError: There is nothing to draw, or a map does not fit `coverage`.
        PoreError: matplotlib is not installed.
    """
    frames = np.concatenate([np.zeros((0, 4)), *(image.frames.numpy() for image in coverage)])
    boxes = np.concatenate([np.zeros((0, 4)), *(image.boxes.numpy() for image in coverage)])
    views = np.concatenate([np.zeros(0), *_views(coverage)])
    panels = [np.isin(views, layer) & ~np.isnan(boxes).any(1) for layer in layers_of(frames)]
    panels = [chosen for chosen in panels if chosen.any()]
    if not panels or not maps:
        raise InputError("There is no attention on any part of the picture to draw.")
    relative = {title: _relative(values, coverage) for title, values in maps.items()}
    # The few highest cells must not make all other cells look the same.
    top = float(np.quantile(np.concatenate(list(relative.values())), 0.995)) or 1.0
    with style():
        from matplotlib.collections import PolyCollection
        from matplotlib.figure import Figure

        shapes = []
        for chosen in panels:  # as large as their tokens, without padding that has none
            (left, up), (right, low) = boxes[chosen, :2].min(0), boxes[chosen, 2:].max(0)
            side = np.sqrt(np.clip((right - left) / (low - up), 1 / LONGEST, LONGEST))
            shapes.append((left, up, right, low, _SIDE * side, _SIDE / side))
        across = len(relative) * max(shape[4] for shape in shapes) + 1.0
        down = sum(shape[5] + 0.4 for shape in shapes)
        figure = Figure(figsize=(across, down), layout="constrained")
        axes = figure.subplots(len(panels), len(relative), squeeze=False)
        drawn = None
        for axis, title in zip(axes[0], relative, strict=True):
            axis.set_title(for_figure(title, 34, 2))
        for row, chosen, (left, up, right, low, wide, high) in zip(
            axes, panels, shapes, strict=True
        ):
            corners = boxes[chosen][:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
            for axis, values in zip(row, relative.values(), strict=True):
                drawn = PolyCollection(
                    list(corners), array=values[chosen], cmap="cividis", edgecolors="face", lw=0.2
                )
                drawn.set_clim(0.0, top)
                axis.add_collection(drawn)
                axis.set(xlim=(left, right), ylim=(low, up), xticks=[], yticks=[])
                axis.set_aspect(high / (low - up) * (right - left) / wide)
                axis.spines[:].set_visible(False)
        assert drawn is not None
        over = any(values.max() > top for values in relative.values())
        bar = figure.colorbar(drawn, ax=axes, pad=0.02, extend="max" if over else "neither")
        bar.set_label(f"{for_figure(unit)}, relative to the mean")
        bar.outline.set_visible(False)
    return figure


def _views(coverage: Sequence[Coverage]) -> Iterator[npt.NDArray[np.int64]]:
    """The view of every token, numbered through over all images."""
    first = 0
    for image in coverage:
        yield image.views.numpy() + first
        first += len(image.frames)


def _relative(
    values: Sequence[npt.ArrayLike], coverage: Sequence[Coverage]
) -> npt.NDArray[np.float64]:
    """All numbers of a map in one row, relative to their mean."""
    rows = [np.asarray(each, dtype=np.float64) for each in values]
    if [row.shape for row in rows] != [(len(image.boxes),) for image in coverage]:
        raise InputError(
            f"The map has {[row.shape for row in rows]} numbers, and the picture "
            f"{[len(image.boxes) for image in coverage]} visual tokens."
        )
    flat: npt.NDArray[np.float64] = np.concatenate(rows).clip(min=0)
    if not np.isfinite(flat).all():
        raise InputError("The map holds NaN or infinity, so there is nothing to draw.")
    mean = flat.mean()
    return flat / mean if mean > 0 else flat
