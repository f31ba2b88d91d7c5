"""The effect of PoRe on every host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pore._text import for_figure
from pore.errors import InputError
from pore.plotting.drawable import check_drawable
from pore.plotting.labels import budget_label, marks
from pore.plotting.style import BLACK, GREY, ORANGE, PURPLE, SKY, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def differences(records: Sequence[Mapping[str, Any]], taught: int | None = None) -> Figure:
    """The effect of PoRe on every host: points with 95 % intervals, overall and by third.

    Args:
        records: Records of a `differences.json`, which compare hosts with P with themselves.
        taught: As in `pore.plotting.labels.marks`.

    Returns:
        The figure: a panel for every budget, a row for every host.

    Raises:
        InputError: There is no record, or one holds something other than numbers.
        PoreError: matplotlib is not installed.
    """
    if not records:
        raise InputError("No method was compared with and without P, so there is nothing to draw.")
    check_drawable(records, names=("third",), shares=("difference", "p"))
    keeps = list(dict.fromkeys(record["keep"] for record in records))
    hosts = list(dict.fromkeys(record["method"] for record in records))
    groups = list(dict.fromkeys(record["third"] for record in records))
    looks = dict(
        zip(groups, ((BLACK, "D"), (SKY, "^"), (ORANGE, "o"), (PURPLE, "v")), strict=False)
    )
    with style():
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        figure = Figure(
            figsize=(1.6 + 2.9 * len(keeps), 1.3 + 0.72 * len(hosts)), layout="constrained"
        )
        axes = figure.subplots(1, len(keeps), sharey=True, sharex=True, squeeze=False)[0]
        for axis, keep in zip(axes, keeps, strict=True):
            axis.axvline(0, color=GREY, lw=1.0)
            for record in records:
                if record["keep"] == keep and record["third"] in looks:
                    color, marker = looks[record["third"]]
                    y = hosts.index(record["method"]) + 0.19 * groups.index(record["third"]) - 0.25
                    ends = [100 * end for end in record["ci"]]
                    axis.plot(ends, [y, y], color=color, lw=1.6 if record["third"] is None else 1.0)
                    clear = record["p"] < 0.05
                    axis.plot(
                        [100 * record["difference"]],
                        [y],
                        color=color,
                        marker=marker,
                        mfc=color if clear else "white",
                        ms=5.0,
                        ls="",
                    )
            axis.set_title(for_figure(budget_label(keep), 30))
            axis.grid(axis="x", color="#EEEEEE", lw=0.7)
            axis.set_axisbelow(True)
            axis.tick_params(axis="y", length=0)
        names = {r["method"]: for_figure(r["method"], 30) + marks(r, taught) for r in records}
        axes[0].set_yticks(range(len(hosts)), [names[host] for host in hosts])
        axes[0].set_ylim(len(hosts) - 0.4, -0.6)
        figure.supxlabel("accuracy with PoRe minus accuracy without, in points", fontsize=9)
        handles = [
            Line2D([], [], color=color, marker=marker, ls="", ms=5, label=_group(group))
            for group, (color, marker) in looks.items()
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


def _group(third: str | None) -> str:
    return "all questions" if third is None else for_figure(third, 20)
