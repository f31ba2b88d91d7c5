"""The figure of how much a position bias depends on the number of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pore.plotting.style import BLUE, GREY, VERMILION, panels, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def stability(
    agreement: Sequence[tuple[int, float, float]],
    images: int,
    enough: float,
    *,
    narrow: bool = False,
) -> Figure:
    """What P of a number of images keeps of what P of endlessly many would keep.

    Args:
        agreement: For every number of images that number, the usual share and the least.
        images: How many were measured.
        enough: The share that is enough.
        narrow: Whether it is for a phone.

    Returns:
        The figure.

    Raises:
        PoreError: matplotlib is not installed.
    """
    counts, usual, least = ([each[i] for each in agreement] for i in range(3))
    with style():
        from matplotlib.ticker import NullLocator, PercentFormatter

        figure, (axis,) = panels(1, (7.6, 3.2), narrow)
        axis.fill_between(counts, least, usual, color=BLUE, alpha=0.18, lw=0)
        axis.plot(counts, usual, color=BLUE, marker="o", ms=4, label="on average")
        axis.plot(counts, least, color=BLUE, lw=1.0, ls="--", label="in 19 of 20 draws at least")
        axis.axhline(enough, color=VERMILION, lw=1.2, label=f"enough: {enough:.0%}")
        axis.axvline(images, color=GREY, lw=1.0, ls=(0, (4, 3)), label=f"measured: {images}")
        axis.set_xscale("log")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_xlabel("images")
        axis.set_ylabel("of what is kept, the same")
        axis.legend(loc="lower right")
    return figure
