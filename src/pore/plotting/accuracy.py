"""The pictures: the position bias on the grid and over position, kept tokens, accuracy over FLOPs.

Figures are drawn without pyplot, so that no display is needed and no global state is left.
matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from pore._text import for_figure
from pore.errors import InputError
from pore.evaluation.records import marks
from pore.plotting.labels import UNPRUNED, budget_label, label
from pore.plotting.style import _BLACK, _CYCLE, _GREY, _MARKERS, _ORANGE, _PURPLE, _SKY, _style

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image


def accuracy_over_flops(records: Sequence[Mapping[str, Any]], taught: int | None = None) -> Figure:
    """Accuracy of every method over the FLOPs it needs, with 95 % confidence intervals.

    Methods are shifted sideways by less than a marker, so that those of equal cost can be told
    apart. More methods than there are colours get a panel for each place where they act, a label
    each at their end, and no intervals; a line leads from a host to the same with PoRe.

    Args:
        records: Records of a `results.json`.
        taught: Marks methods where there are many, see `pore.evaluation.records.marks`.

    Returns:
        The figure.

    Raises:
        InputError: No record says its FLOPs, or one says something else than a number.
        PoreError: matplotlib is not installed.
    """
    _check(records, names=("reweight", "acts_in"), shares=("accuracy",), costs=("flops",))
    known = [record for record in records if record["flops"] is not None]
    if not known:
        raise InputError("No result says its FLOPs, so there is nothing to draw accuracy over.")
    unpruned = [record for record in known if record["method"] == UNPRUNED]
    methods: dict[str, list[Mapping[str, Any]]] = {}
    for record in known:
        if record["method"] != UNPRUNED:
            methods.setdefault(label(record["method"], record["reweight"]), []).append(record)
    placed = all(points[0].get("acts_in") in _PLACES for points in methods.values())
    if len(methods) > len(_CYCLE) and placed:
        return _by_place(unpruned, methods, taught)
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axis = figure.subplots()
        for record in unpruned:
            _level(axis, record)
            _point(axis, [record], "unpruned", _BLACK, "*")
        costs = [record["flops"] / 1e9 for record in known]
        step = 0.007 * (max(costs) - min(costs))
        for i, (name, points) in enumerate(methods.items()):
            points = sorted(points, key=lambda record: record["flops"])
            color, marker = _CYCLE[i % len(_CYCLE)], _MARKERS[i % len(_MARKERS)]
            _point(
                axis, points, for_figure(name), color, marker, (i - (len(methods) - 1) / 2) * step
            )
        axis.set_xlabel("FLOPs of the prefill, tower included (billions; multiply-add = 2)")
        axis.set_ylabel("accuracy (%)")
        axis.set_title("Accuracy over cost, with 95 % confidence")
        axis.grid(axis="y", color="#DDDDDD", lw=0.7)
        axis.set_axisbelow(True)
        axis.legend(loc="lower right")
    return figure


def _level(axis: Axes, record: Mapping[str, Any]) -> None:
    """A line across, with its confidence band."""
    low, high = (100 * end for end in record["ci"])
    axis.axhspan(low, high, color=_GREY, alpha=0.18, lw=0)
    axis.axhline(100 * record["accuracy"], color=_GREY, lw=1.4, ls=(0, (4, 3)))


_PLACES = {
    "tower": "In the vision tower",
    "embeddings": "Before the decoder",
    "decoder": "Inside the decoder",
}


def _by_place(
    unpruned: Sequence[Mapping[str, Any]],
    methods: Mapping[str, Sequence[Mapping[str, Any]]],
    taught: int | None,
) -> Figure:
    """Many methods: a panel for each place where they act, the others pale in the background."""
    from matplotlib.figure import Figure

    own = {
        name: sorted(points, key=lambda record: float(record["flops"]))
        for name, points in methods.items()
        if points[0]["reweight"] is None
    }
    if not own:
        raise InputError("All results are with P, so there is no host to draw them from.")
    # Of P only what was measured is drawn, beside its host.
    pore = {
        (record["method"], record["keep"]): record
        for points in methods.values()
        for record in points
        if record["reweight"] not in (None, "rope")
    }
    places = [p for p in _PLACES if any(points[0]["acts_in"] == p for points in own.values())]
    every = [r for points in methods.values() for r in points]
    left, right = (f(r["flops"] / 1e9 for r in every) for f in (min, max))
    low, high = (f(100 * r["accuracy"] for r in [*every, *unpruned]) for f in (min, max))
    width = right - left or 1.0
    with _style():
        figure = Figure(figsize=(1.0 + 4.1 * len(places), 5.6), layout="constrained")
        axes = figure.subplots(1, len(places), sharey=True, squeeze=False)[0]
        for axis, place in zip(axes, places, strict=True):
            for record in unpruned:
                _level(axis, record)
            shown = [name for name, points in own.items() if points[0]["acts_in"] == place]
            for name in own.keys() - set(shown):
                axis.plot(*_path(own[name]), color="#E3E3E3", lw=1.0, zorder=1)
            ends = []
            for i, name in enumerate(shown):
                # A second round of colours has other markers, and dashes.
                again, of = divmod(i, len(_CYCLE))
                color, marker = _CYCLE[of], _MARKERS[(of + again) % len(_MARKERS)]
                x, y = _path(own[name])
                dash = "--" if again else "-"
                axis.plot(x, y, color=color, marker=marker, ms=4.5, lw=1.4, ls=dash, zorder=3)
                for record, start in zip(own[name], y, strict=True):
                    if (record["method"], record["keep"]) in pore:
                        _to_pore(axis, record, pore[record["method"], record["keep"]], start, color)
                shown_as = for_figure(name, 30) + marks(own[name][0], taught)
                ends.append((y[-1], x[-1], shown_as, color))
            edge = max(x for _, x, _, _ in ends) + 0.06 * width
            _labels(axis, ends, edge, 0.036 * (high - low))
            axis.set_title(_PLACES[place])
            axis.set_xlim(left - 0.05 * width, right + 0.5 * width)
            axis.set_xlabel("GFLOPs of the prefill, tower included")
            axis.grid(axis="y", color="#EEEEEE", lw=0.7)
            axis.set_axisbelow(True)
        axes[0].set_ylabel("accuracy (%)")
        spread = [100 * (r["ci"][1] - r["ci"][0]) for r in every]
        costs = [f" ({record['flops'] / 1e9:.3g} GFLOPs)" for record in unpruned]
        figure.suptitle(
            f"Accuracy over cost. Open markers: with PoRe. Dashed: unpruned{''.join(costs)}. "
            f"95 % intervals are {min(spread):.1f} to {max(spread):.1f} points wide.",
            fontsize=9,
            x=0.01,
            ha="left",
        )
    return figure


def _path(records: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [r["flops"] / 1e9 for r in records], [100 * r["accuracy"] for r in records]


def _to_pore(
    axis: Axes, host: Mapping[str, Any], other: Mapping[str, Any], start: float, color: str
) -> None:
    """From a host to the same with PoRe, which costs the same."""
    x, end = host["flops"] / 1e9, 100 * other["accuracy"]
    axis.plot([x, x], [start, end], color=color, lw=1.0, zorder=2)
    axis.plot([x], [end], color=color, marker="o", mfc="white", ms=5.5, mew=1.3, zorder=4)


def _labels(
    axis: Axes, ends: Sequence[tuple[float, float, str, str]], x: float, gap: float
) -> None:
    """Names to the right of where lines end, pushed apart, each with a thin line to its own."""
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


def differences(records: Sequence[Mapping[str, Any]], taught: int | None = None) -> Figure:
    """What PoRe gives every host, in points with 95 % intervals, over all and by third.

    Args:
        records: Records of a `differences.json`, of hosts with P against themselves.
        taught: Marks methods, see `pore.evaluation.records.marks`.

    Returns:
        The figure: a panel for every budget, a row for every host.

    Raises:
        InputError: There is no record, or one says something else than numbers.
        PoreError: matplotlib is not installed.
    """
    if not records:
        raise InputError("No method was compared with itself, so there is nothing to draw.")
    _check(records, names=("third",), shares=("difference", "p_mcnemar"))
    keeps = list(dict.fromkeys(record["keep"] for record in records))
    hosts = list(dict.fromkeys(record["method"] for record in records))
    groups = list(dict.fromkeys(record["third"] for record in records))
    looks = dict(
        zip(groups, ((_BLACK, "D"), (_SKY, "^"), (_ORANGE, "o"), (_PURPLE, "v")), strict=False)
    )
    with _style():
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        figure = Figure(
            figsize=(1.6 + 2.9 * len(keeps), 1.3 + 0.72 * len(hosts)), layout="constrained"
        )
        axes = figure.subplots(1, len(keeps), sharey=True, sharex=True, squeeze=False)[0]
        for axis, keep in zip(axes, keeps, strict=True):
            axis.axvline(0, color=_GREY, lw=1.0)
            for record in records:
                if record["keep"] == keep and record["third"] in looks:
                    color, marker = looks[record["third"]]
                    y = hosts.index(record["method"]) + 0.19 * groups.index(record["third"]) - 0.25
                    ends = [100 * end for end in record["ci"]]
                    axis.plot(ends, [y, y], color=color, lw=1.6 if record["third"] is None else 1.0)
                    clear = record["p_mcnemar"] < 0.05
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
        figure.supxlabel("accuracy with PoRe less without, in points", fontsize=9)
        handles = [
            Line2D([], [], color=color, marker=marker, ls="", ms=5, label=_group(group))
            for group, (color, marker) in looks.items()
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


def _group(third: str | None) -> str:
    return "all questions" if third is None else for_figure(third, 20)


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


def _title(figure: Figure, text: str, size: float) -> None:
    """A title over the whole figure, in lines as long as it is wide."""
    width = int(figure.get_figwidth() * 72 / (0.62 * size))
    shown = for_figure(text, max(width, 20), 4)
    figure.set_figheight(figure.get_figheight() + shown.count("\n") * 1.5 * size / 72)
    figure.suptitle(shown, fontsize=size, fontweight="bold", x=0.01, ha="left")


def _pixels(image: Image | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """An image as (height, width, 3) pixels."""
    pixels = np.asarray(image if isinstance(image, np.ndarray) else image.convert("RGB"))
    if pixels.ndim != 3 or pixels.shape[2] < 3 or 0 in pixels.shape or pixels.dtype != np.uint8:
        raise InputError(
            "An image is a picture of Pillow or whole numbers from 0 to 255 (uint8) of shape "
            f"(height, width, 3), not {pixels.dtype} of shape {pixels.shape}."
        )
    return pixels[..., :3]


def _relative(error: npt.NDArray[np.float64], mean: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Errors relative to their means; where nothing was attended to, there is none."""
    values = np.asarray(mean, dtype=np.float64)
    return np.divide(error, values, out=np.zeros_like(error), where=values > 0)


def _check(
    records: Sequence[Mapping[str, Any]],
    *,
    names: Sequence[str] = (),
    shares: Sequence[str] = (),
    costs: Sequence[str] = (),
) -> None:
    """Refuse records that cannot be drawn: files may hold anything.

    Args:
        records: The records.
        names: Fields that are text or None, beside the method.
        shares: Fields that are a share, or a difference of shares.
        costs: Fields that are a number of at least 0, or None.

    Raises:
        InputError: Names the record, field and value.
    """

    def share(value: object) -> bool:
        return _is_number(value) and abs(value) <= 1

    def cost(value: object) -> bool:
        return value is None or (_is_number(value) and value >= 0)

    for number, record in enumerate(records, 1):
        ends = record["ci"]
        fine = {
            "method": isinstance(record["method"], str),
            "keep": isinstance(record["keep"], str | None) or _is_number(record["keep"]),
            "ci": isinstance(ends, (list, tuple)) and len(ends) == 2 and all(map(share, ends)),
            "looks_at": isinstance(record.get("looks_at", []), list)
            and all(isinstance(layer, int) for layer in record.get("looks_at", [])),
            **{name: isinstance(record.get(name), str | None) for name in names},
            **{name: share(record[name]) for name in shares},
            **{n: cost(record[n]) for n in costs},
        }
        if wrong := [name for name, right in fine.items() if not right]:
            shown = repr(record.get(wrong[0]))[:80]
            raise InputError(f"Result {number} cannot be drawn: its {wrong[0]!r} is {shown}.")


def _is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number of a size that axes can have."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100
