"""One style of all figures."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pore._files import write_atomic
from pore.errors import InputError, PoreError

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.figure import Figure


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
    # Whatever users wrote is text: a question about dollars holds no formula, and no LaTeX runs.
    "text.parse_math": False,
    "text.usetex": False,
}


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
    with _style(), warnings.catch_warnings():
        # Boxes stand for what the font lacks, such as emoji.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
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


def _mask(kept: Sequence[int], grid: tuple[int, int]) -> npt.NDArray[np.bool_]:
    mask = np.zeros(grid[0] * grid[1], dtype=bool)
    indices = np.asarray(list(kept), dtype=int)
    if indices.size and not 0 <= indices.min() <= indices.max() < mask.size:
        raise InputError(f"A kept token lies outside the grid of {grid[0]}×{grid[1]}.")
    mask[indices] = True
    return mask.reshape(grid)
