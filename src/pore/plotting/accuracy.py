"""Accuracy over cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pore._text import for_figure
from pore.errors import InputError
from pore.plotting.drawable import check_drawable
from pore.plotting.labels import UNPRUNED, label
from pore.plotting.places import PLACES, by_place, level
from pore.plotting.style import BLACK, CYCLE, MARKERS, panels, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def accuracy_over_flops(
    records: Sequence[Mapping[str, Any]], taught: int | None = None, *, narrow: bool = False
) -> Figure:
    """Accuracy of every method over the FLOPs it needs, with 95 % confidence intervals.

    Methods are shifted sideways by less than a marker, so that methods of equal cost can be told
    apart. If there are more methods than colours, there is a panel for each place where methods
    act; names stand at the ends of the lines, intervals are left out, and a line leads from every
    host to the same host with PoRe.

    Args:
        records: Records of a `results.json`.
        taught: As in `pore.plotting.labels.marks`; used if there are many methods.
        narrow: Whether it is for a phone, with panels one below the other.

    Returns:
        The figure.

    Raises:
        InputError: No record holds its FLOPs, or one holds something other than a number.
        PoreError: matplotlib is not installed.
    """
    check_drawable(records, names=("reweight", "acts_in"), shares=("accuracy",), costs=("flops",))
    known = [record for record in records if record["flops"] is not None]
    if not known:
        raise InputError("No result holds its FLOPs, so accuracy cannot be drawn over them.")
    unpruned = [record for record in known if record["method"] == UNPRUNED]
    methods: dict[str, list[Mapping[str, Any]]] = {}
    for record in known:
        if record["method"] != UNPRUNED:
            methods.setdefault(label(record["method"], record["reweight"]), []).append(record)
    placed = all(points[0].get("acts_in") in PLACES for points in methods.values())
    if len(methods) > len(CYCLE) and placed:
        return by_place(unpruned, methods, taught, narrow)
    with style():
        figure, (axis,) = panels(1, (6.4, 4.0), narrow)
        for record in unpruned:
            level(axis, record)
            _point(axis, [record], "unpruned", BLACK, "*")
        costs = [record["flops"] / 1e9 for record in known]
        step = 0.007 * (max(costs) - min(costs))
        for i, (name, points) in enumerate(methods.items()):
            points = sorted(points, key=lambda record: record["flops"])
            color, marker = CYCLE[i % len(CYCLE)], MARKERS[i % len(MARKERS)]
            _point(
                axis, points, for_figure(name), color, marker, (i - (len(methods) - 1) / 2) * step
            )
        of = "" if narrow else " (billions; multiply-add = 2)"
        axis.set_xlabel(f"GFLOPs of the prefill, tower included{of}")
        axis.set_ylabel("accuracy (%)")
        axis.set_title("Accuracy over cost, with 95 % intervals")
        axis.grid(axis="y", color="#DDDDDD", lw=0.7)
        axis.set_axisbelow(True)
        if narrow:
            figure.set_figheight(figure.get_figheight() + 1.2)
            figure.legend(loc="outside lower center", ncols=2)
        else:
            axis.legend(loc="lower right")
    return figure


def _point(
    axis: Axes,
    records: Sequence[Mapping[str, Any]],
    name: str,
    color: str,
    marker: str,
    shift: float = 0.0,
) -> None:
    accuracy = np.array([100 * record["accuracy"] for record in records])
    ends = np.array([[100 * end for end in record["ci"]] for record in records])
    axis.errorbar(
        [record["flops"] / 1e9 + shift for record in records],
        accuracy,
        yerr=np.abs(ends.T - accuracy),
        label=name,
        color=color,
        marker=marker,
        markersize=5.5 if marker != "*" else 10,
        lw=1.5,
        elinewidth=0.9,
        capsize=2.5,
    )
