"""Accuracy over cost of many methods, with a panel for each place where methods act."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pore._text import for_figure
from pore.errors import InputError
from pore.plotting.labels import marks
from pore.plotting.style import CYCLE, GREY, MARKERS, panels, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


PLACES = {
    "tower": "In the vision tower",
    "embeddings": "Before the decoder",
    "decoder": "Inside the decoder",
}


def by_place(
    unpruned: Sequence[Mapping[str, Any]],
    methods: Mapping[str, Sequence[Mapping[str, Any]]],
    taught: int | None,
    narrow: bool = False,
) -> Figure:
    """Draw many methods: a panel for each place where methods act, with the others pale behind."""
    own = {
        name: sorted(points, key=lambda record: float(record["flops"]))
        for name, points in methods.items()
        if points[0]["reweight"] is None
    }
    if not own:
        raise InputError("All results are with P; a host without P is needed to draw them.")
    # Of the results with P, only those with a measured P are drawn, beside their host.
    pore = {
        (record["method"], record["keep"]): record
        for points in methods.values()
        for record in points
        if record["reweight"] not in (None, "rope")
    }
    places = [p for p in PLACES if any(points[0]["acts_in"] == p for points in own.values())]
    every = [r for points in methods.values() for r in points]
    left, right = (f(r["flops"] / 1e9 for r in every) for f in (min, max))
    low, high = (f(100 * r["accuracy"] for r in [*every, *unpruned]) for f in (min, max))
    width = right - left or 1.0
    with style():
        figure, axes = panels(len(places), (1.0 + 4.1 * len(places), 5.6), narrow, sharey=True)
        for axis, place in zip(axes, places, strict=True):
            for record in unpruned:
                level(axis, record)
            shown = [name for name, points in own.items() if points[0]["acts_in"] == place]
            for name, records in own.items():
                if name not in shown:
                    axis.plot(*_path(records), color="#E3E3E3", lw=1.0, zorder=1)
            ends = _hosts(axis, {name: own[name] for name in shown}, pore, taught)
            edge = max(x for _, x, _, _ in ends) + 0.06 * width
            _labels(axis, ends, edge, 0.036 * (high - low))
            axis.set_title(PLACES[place])
            axis.set_xlim(left - 0.05 * width, right + 0.5 * width)
            axis.set_xlabel("GFLOPs of the prefill, tower included")
            axis.grid(axis="y", color="#EEEEEE", lw=0.7)
            axis.set_axisbelow(True)
        for axis in axes:
            # Names may stand above 100 %; no accuracy does.
            bottom, top = axis.get_ylim()
            axis.set_yticks([tick for tick in axis.get_yticks() if bottom <= tick <= min(top, 100)])
        for axis in axes if narrow else axes[:1]:
            axis.set_ylabel("accuracy (%)")
        spread = [100 * (r["ci"][1] - r["ci"][0]) for r in every]
        costs = [f" ({record['flops'] / 1e9:.3g} GFLOPs)" for record in unpruned]
        about = (
            f"Accuracy over cost. Open markers: with PoRe. Dashed: unpruned{''.join(costs)}. "
            f"95 % intervals are {min(spread):.1f} to {max(spread):.1f} points wide."
        )
        figure.suptitle(
            for_figure(about, 50, 4) if narrow else about, fontsize=9, x=0.01, ha="left"
        )
    return figure


def _hosts(
    axis: Axes,
    shown: Mapping[str, Sequence[Mapping[str, Any]]],
    pore: Mapping[tuple[str, Any], Mapping[str, Any]],
    taught: int | None,
) -> list[tuple[float, float, str, str]]:
    """Draw a line for every method of a panel; returns where each ends, for `_labels`."""
    ends = []
    for i, (name, records) in enumerate(shown.items()):
        # A second round of colours has other markers, and dashes.
        again, of = divmod(i, len(CYCLE))
        color, marker = CYCLE[of], MARKERS[(of + again) % len(MARKERS)]
        x, y = _path(records)
        dash = "--" if again else "-"
        axis.plot(x, y, color=color, marker=marker, ms=4.5, lw=1.4, ls=dash, zorder=3)
        for record, start in zip(records, y, strict=True):
            if (record["method"], record["keep"]) in pore:
                _to_pore(axis, record, pore[record["method"], record["keep"]], start, color)
        ends.append((y[-1], x[-1], for_figure(name, 30) + marks(records[0], taught), color))
    return ends


def _path(records: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [r["flops"] / 1e9 for r in records], [100 * r["accuracy"] for r in records]


def _to_pore(
    axis: Axes, host: Mapping[str, Any], other: Mapping[str, Any], start: float, color: str
) -> None:
    """Draw a line from a host to the same host with PoRe, which costs the same."""
    x, end = host["flops"] / 1e9, 100 * other["accuracy"]
    axis.plot([x, x], [start, end], color=color, lw=1.0, zorder=2)
    axis.plot([x], [end], color=color, marker="o", mfc="white", ms=5.5, mew=1.3, zorder=4)


def _labels(
    axis: Axes, ends: Sequence[tuple[float, float, str, str]], x: float, gap: float
) -> None:
    """Write names to the right of the lines' ends, pushed apart, each joined to its line."""
    from matplotlib.patheffects import withStroke

    ends = sorted(ends)
    places = [y for y, *_ in ends]
    for _ in range(200):
        for i in range(len(places) - 1):
            close = gap - (places[i + 1] - places[i])
            if close > 0:
                places[i] -= close / 2
                places[i + 1] += close / 2
    for place, (y, end, name, color) in zip(places, ends, strict=True):
        axis.plot([end, x], [y, place], color=color, lw=0.6, alpha=0.7, zorder=2)
        axis.annotate(
            name,
            (x, place),
            (2, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=8,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )


def level(axis: Axes, record: Mapping[str, Any]) -> None:
    """Draw a horizontal line with its confidence band."""
    low, high = (100 * end for end in record["ci"])
    axis.axhspan(low, high, color=GREY, alpha=0.18, lw=0)
    axis.axhline(100 * record["accuracy"], color=GREY, lw=1.4, ls=(0, (4, 3)))
