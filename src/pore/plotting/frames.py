"""The tokens that are kept of a video, drawn over its frames: side by side, or one by one."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pore._files import write_atomic
from pore.errors import InputError
from pore.plotting.kept import (
    LONGEST,
    Merges,
    dimmed,
    hatch,
    kept_mask,
    outline,
    pixels_of,
    tell_merges,
)
from pore.plotting.style import BLUE, GREY, style, title_over

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from pore.data.seen_frames import SeenFrame

ANIMATIONS = (".gif", ".webp")
"""How the names of moving pictures end that can be written."""

_ACROSS = 8  # frames in a row
_SIDE = 1.3  # inches
_PIXELS = 480  # the longer side of a moving picture, at least and about
_LINE = 2  # pixels


@dataclass(frozen=True)
class Frame:
    """What is kept of a frame of a video.

    Attributes:
        image: The part of the frame that its tokens show.
        grid: Rows and columns of its tokens.
        kept: Raster indices, within the frame, of the tokens that stay.
        caption: Which frame it is.
        merges: As in `pore.plotting.Seen`.
    """

    image: Image
    grid: tuple[int, int]
    kept: Sequence[int]
    caption: str
    merges: Merges | None = None

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """(rows, columns) bool, True where a token is kept."""
        return kept_mask(self.kept, self.grid)


def frames_kept(
    seen: Sequence[SeenFrame],
    kept: Sequence[Sequence[int]] | None = None,
    merges: Merges | None = None,
) -> list[Frame]:
    """What is kept of every frame, to be drawn.

    Args:
        seen: The frames, from `pore.data.seen_frames`.
        kept: For every image of the prompt, raster indices of the tokens that stay; None for all.
        merges: As in `pore.plotting.Seen`.
    """
    return [
        Frame(
            one.picture,
            one.grid,
            range(one.grid[0] * one.grid[1]) if kept is None else one.kept(kept),
            f"frame {one.number + 1}",
            merges,
        )
        for one in seen
    ]


def strip(frames: Sequence[Frame], *, title: str | None = None) -> Figure:
    """The frames of a video in the order of reading, with what is kept of each.

    Args:
        frames: One or more frames of one size.
        title: Title of the whole figure, such as the question.

    Returns:
        The figure.

    Raises:
        InputError: There is no frame, or a token lies outside of its grid.
        PoreError: matplotlib is not installed.
    """
    if not frames:
        raise InputError("There are no frames to draw.")
    first = pixels_of(frames[0].image)
    shape = float(np.clip(first.shape[0] / first.shape[1], 1 / LONGEST, LONGEST))
    columns = min(_ACROSS, len(frames))
    rows = -(-len(frames) // columns)
    with style():
        from matplotlib.figure import Figure

        size = (_SIDE * columns + 0.2, (_SIDE * shape + 0.4) * rows + 0.4)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
        for axis, frame in zip(axes, frames, strict=False):
            mask, (height, width) = frame.mask, frame.grid
            place: Any = {"extent": (0, width, height, 0), "aspect": shape * width / height}
            axis.imshow(dimmed(pixels_of(frame.image), mask), interpolation="nearest", **place)
            outline(axis, mask)
            if frame.merges is not None:
                down, across = np.nonzero(~mask)
                hatch(axis, np.stack([across, down, across + 1, down + 1], 1))
            axis.set_title(frame.caption, fontsize=7.5, loc="center", fontweight="normal")
            axis.set_xlabel(f"{mask.sum()} of {mask.size}", fontsize=7.5, color=GREY)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis in axes[len(frames) :]:
            axis.set_visible(False)
        tell_merges(figure, {frame.merges for frame in frames})
        if title is not None:
            title_over(figure, title, 9)
    return figure


def animated(frames: Sequence[Frame], path: str | os.PathLike[str], seconds: float = 0.7) -> Path:
    """Write the frames of a video with what is kept of each, one after the other, without an end.

    Args:
        frames: One or more frames of one size.
        path: The file, whose name says in which format (`ANIMATIONS`); missing folders are made.
        seconds: How long a frame stays.

    Returns:
        The path written.

    Raises:
        InputError: There is no frame, a token lies outside of its grid, or the format is another.
        OSError: It cannot be written.
    """
    file = Path(path)
    if file.suffix.lower() not in ANIMATIONS:
        raise InputError(f"A moving picture is one of {', '.join(ANIMATIONS)}, not {file.name}.")
    if not frames:
        raise InputError("There are no frames to draw.")
    first, *others = [_painted(frame) for frame in frames]
    buffer = io.BytesIO()
    first.save(
        buffer,
        format=file.suffix[1:].upper(),
        save_all=True,
        append_images=others,
        duration=round(1000 * seconds),
        loop=0,
        lossless=True,  # of a WebP
    )
    return write_atomic(file, buffer.getvalue())


def _painted(frame: Frame) -> Image:
    """A frame with dropped tokens nearly white, and lines around the kept ones."""
    from PIL import Image

    pixels, mask = pixels_of(frame.image), frame.mask
    times = max(1, round(_PIXELS / max(pixels.shape[:2])))
    shown = dimmed(pixels.repeat(times, 0).repeat(times, 1), mask)
    if not mask.all():
        color = [int(BLUE[i : i + 2], 16) for i in (1, 3, 5)]
        height, width = shown.shape[:2]
        rows = np.arange(height) * mask.shape[0] // height
        columns = np.arange(width) * mask.shape[1] // width
        inside = np.pad(mask[rows[:, None], columns[None]], _LINE)
        # A pixel of a kept token is on a line if a pixel near to it, in one of the four
        # directions, is not.
        near = [np.roll(inside, by, axis) for by in (-_LINE, _LINE) for axis in (0, 1)]
        line = inside & ~np.all(near, 0)
        shown[line[_LINE:-_LINE, _LINE:-_LINE]] = color
    return Image.fromarray(shown)
