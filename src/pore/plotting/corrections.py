"""What every correction does to every host, as a grid of colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pore._numbers import points
from pore._text import for_figure
from pore.errors import InputError
from pore.plotting.drawable import check_drawable
from pore.plotting.labels import budget_label, marks
from pore.plotting.style import BLACK, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = 15.0
"""Points from which on colours do not get stronger."""

CLEAR = 0.01
"""The p below which a number is set in bold."""


def corrections(records: Sequence[Mapping[str, Any]], taught: int | None = None) -> Figure:
    """The difference that every correction makes to every host, in points.

    Args:
        records: Records of a `differences.json` of a comparison of corrections; those of a third of
            the image are left out.
        taught: As in `pore.plotting.labels.marks`.

    Returns:
        The figure: a panel for every budget, a row for every correction, a column for every host.

    Raises:
        InputError: There is no record, or one holds something other than numbers.
        PoreError: matplotlib is not installed.
    """
    records = [record for record in records if record["third"] is None]
    if not records:
        raise InputError("No host was compared with and without a correction: nothing to draw.")
    check_drawable(records, names=("reweight",), shares=("difference", "p"))
    keeps = list(dict.fromkeys(record["keep"] for record in records))
    hosts = {r["method"]: for_figure(r["method"], 20) + marks(r, taught) for r in records}
    names = list(dict.fromkeys(str(record["reweight"]) for record in records))
    with style():
        from matplotlib.figure import Figure

        width, height = 0.62 * len(hosts), 0.27 * len(names)
        figure = Figure(
            figsize=(2.2 + (width + 0.3) * len(keeps), 1.6 + height), layout="constrained"
        )
        axes = figure.subplots(1, len(keeps), sharey=True, squeeze=False)[0]
        for axis, keep in zip(axes, keeps, strict=True):
            grid = [[float("nan")] * len(hosts) for _ in names]
            for record in records:
                if record["keep"] == keep:
                    row = names.index(str(record["reweight"]))
                    column = list(hosts).index(record["method"])
                    grid[row][column] = 100 * record["difference"]
                    axis.text(
                        column,
                        row,
                        points(record["difference"]),
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if abs(grid[row][column]) > 0.7 * _MOST else BLACK,
                        fontweight="bold" if record["p"] < CLEAR else "normal",
                    )
            image = axis.imshow(grid, cmap="RdBu", vmin=-_MOST, vmax=_MOST, aspect="auto")
            axis.set_title(for_figure(budget_label(keep), 30))
            axis.set_xticks(range(len(hosts)), [*hosts.values()], rotation=40, ha="right")
            axis.set_yticks(range(len(names)), [for_figure(name, 40) for name in names])
            axis.tick_params(length=0)
        bar = figure.colorbar(image, ax=axes[-1], fraction=0.05, pad=0.02, extend="both")
        bar.set_label("points better than the host alone")
    return figure
