"""The style of all figures. They are drawn without pyplot: no display, no global state."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pore._files import write_atomic
from pore._text import for_figure
from pore.errors import PoreError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Okabe and Ito's palette, told apart with any colour vision.
BLACK, ORANGE, SKY, GREEN = "#222222", "#E69F00", "#56B4E9", "#009E73"


BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#8A8A8A"


CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)


MARKERS = ("o", "s", "^", "D", "v", "P", "X")


NARROW = 3.7
"""The width of figures for a phone, in inches."""

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
    "xtick.labelcolor": BLACK,
    "ytick.labelcolor": BLACK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    # Users' text stays text: a question about dollars is no formula, and no LaTeX runs.
    "text.parse_math": False,
    "text.usetex": False,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in the style of all figures inside the block; the settings before it are restored."""
    try:
        import matplotlib
    except ImportError as error:
        raise PoreError(
            "Drawing needs matplotlib; install it with: pip install 'pore-vlm[plot]'"
        ) from error
    with matplotlib.rc_context(_STYLE):
        yield


def panels(count: int, size: tuple[float, float], narrow: bool, **how: Any) -> tuple[Figure, Any]:
    """A figure with panels side by side, or for a phone one below the other.

    Args:
        count: The number of panels.
        size: Width and height of the whole figure, in inches, with the panels side by side.
        narrow: Whether the figure is for a phone: as wide as its screen, so that text has the size
            of the text around it.
        **how: Further arguments of `Figure.subplots`.

    Returns:
        The figure and an array of its axes.
    """
    from matplotlib.figure import Figure

    if narrow:
        size = (NARROW, count * size[1] * min(NARROW / size[0] * count, 1.0) + 0.5)
        how.pop("width_ratios", None)
    figure = Figure(figsize=size, layout="constrained")
    shape = (count, 1) if narrow else (1, count)
    return figure, figure.subplots(*shape, squeeze=False, **how).reshape(-1)


def title_over(figure: Figure, text: str, size: float) -> None:
    """Put a title over the whole figure, in lines as long as the figure is wide."""
    width = int(figure.get_figwidth() * 72 / (0.62 * size))
    shown = for_figure(text, max(width, 20), 4)
    figure.set_figheight(figure.get_figheight() + shown.count("\n") * 1.5 * size / 72)
    figure.suptitle(shown, fontsize=size, fontweight="bold", x=0.01, ha="left")


def to_png(figure: Figure, dpi: int = 200) -> bytes:
    """A figure as the bytes of a PNG.

    Args:
        figure: A figure that `pore.plotting` drew.
        dpi: Pixels per inch.

    Returns:
        The file's content.
    """
    buffer = io.BytesIO()
    with style(), warnings.catch_warnings():
        # Characters that the font lacks, such as emoji, are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.06)
    return buffer.getvalue()


def save(figure: Figure, path: str | os.PathLike[str], dpi: int = 200) -> Path:
    """Write a figure as a PNG, whole or not at all.

    Args:
        figure: A figure that `pore.plotting` drew.
        path: The file; missing folders are made.
        dpi: Pixels per inch.

    Returns:
        The path written.

    Raises:
        OSError: It cannot be written.
    """
    return write_atomic(path, to_png(figure, dpi))
