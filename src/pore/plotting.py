"""The pictures: the position bias on the grid and over position, kept tokens, accuracy over FLOPs.

Figures are drawn without pyplot, so that no display is needed and no global state is left.
matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from pore._files import write_atomic
from pore._text import for_figure
from pore.errors import InputError, PoreError
from pore.evaluation.outcome import UNPRUNED, budget_label, label
from pore.evaluation.records import marks

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from pore.bias import PositionBias
    from pore.regions import Regions

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
_Z95 = 1.96
# A panel is drawn at most so many times as long as wide.
_LONGEST = 6.0
# The side of a square panel, in inches.
_SIDE = 2.6


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


def figure1(mean: npt.ArrayLike, bias: PositionBias, grid: tuple[int, int] | None = None) -> Figure:
    """Mean attention on the grid of the image, before and after reweighting (PoRe, Figure 1).

    Both maps are relative to their mean and share one scale. The mean of A / P over samples is
    Ā / P, because P is the same for all.

    Args:
        mean: Ā, of shape (N,): mean attention on every visual token.
        bias: P over the same N positions.
        grid: Rows and columns; those of `bias` if left out.

    Returns:
        The figure.

    Raises:
        InputError: The lengths differ, the mean is none of attention, or no grid is known.
        PoreError: matplotlib is not installed.
    """
    before, after = _before_after(mean, bias)
    grid = grid or bias.grid
    if grid is None or min(grid) < 1 or grid[0] * grid[1] != len(before):
        raise InputError(f"A grid of {len(before)} visual tokens is needed to draw a map.")
    with _style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(7.6, 3.8), layout="constrained")
        axes = figure.subplots(1, 2)
        # The few highest cells may not flatten the picture of all the others.
        top = float(np.quantile(np.concatenate([before, after]), 0.995))
        image = None
        for axis, values, title in zip(
            axes, (before, after), ("Before: mean attention", "After: divided by P"), strict=True
        ):
            image = axis.imshow(
                values.reshape(grid), cmap="cividis", vmin=0.0, vmax=top, interpolation="nearest"
            )
            axis.set_title(title)
            axis.set_xlabel("column of visual tokens")
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(6, integer=True))
            axis.spines[:].set_visible(False)
        axes[0].set_ylabel("row of visual tokens")
        assert image is not None
        extend = "max" if max(before.max(), after.max()) > top else "neither"
        bar = figure.colorbar(image, ax=list(axes), shrink=0.9, pad=0.02, extend=extend)
        bar.set_label("attention, relative to the mean")
        bar.outline.set_visible(False)
    return figure


def figure2(mean: npt.ArrayLike, bias: PositionBias, sem: npt.ArrayLike | None = None) -> Figure:
    """Mean attention over position, its fit, and what reweighting makes of it (PoRe, Figure 2).

    Args:
        mean: Ā, of shape (N,).
        bias: P over the same N positions.
        sem: Standard error of Ā, of shape (N,), for a band of ± 1.96 of them; None for no band.

    Returns:
        The figure.

    Raises:
        InputError: The lengths differ, the mean is none of attention, or an error is none.
        PoreError: matplotlib is not installed.
    """
    before, after = _before_after(mean, bias)
    scale = float(np.asarray(mean, dtype=np.float64).mean())
    fit = bias.values.numpy()
    if bias.residuals is not None:
        # The fitted curve itself, where the fit knows its height.
        fit = (np.asarray(mean, dtype=np.float64) - bias.residuals.numpy()) / scale
    position = np.arange(len(before))
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.6, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        left.plot(position, before, color=_BLUE, lw=1.1, label="mean attention Ā")
        name = f"fit P ({for_figure(bias.kind)})" + (
            f", R² = {bias.r2:.2f}" if bias.r2 is not None and bias.kind != "empirical" else ""
        )
        left.plot(position, fit, color=_VERMILION, lw=2.2, label=name)
        right.plot(position, after, color=_GREEN, lw=1.1, label="reweighted Ā / P")
        right.axhline(1.0, color=_GREY, lw=1.4, ls=(0, (4, 3)), label="no position favoured")
        top = float(max(before.max(), after.max()))
        if sem is not None:
            # The error relative to the mean is the same before and after a division by P.
            spread = _relative(_Z95 * _vector(sem, len(before)), mean)
            top = float(np.nanmax([top, *(before * (1 + spread)), *(after * (1 + spread))]))
            for axis, values, color in ((left, before, _BLUE), (right, after, _GREEN)):
                axis.fill_between(
                    position,
                    values * (1 - spread),
                    values * (1 + spread),
                    color=color,
                    alpha=0.22,
                    lw=0,
                    label="95 % confidence of the mean",
                )
        left.set_title(f"Before: P of last over first = {bias.growth:.2f}")
        right.set_title("After")
        for axis in (left, right):
            axis.set_xlabel("visual token, in raster order")
            axis.set_xlim(0, max(len(before) - 1, 1))
            axis.legend(loc="upper left")
        left.set_ylim(0.0, 1.35 * top)
        left.set_ylabel("attention, relative to the mean")
    return figure


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


@dataclass(frozen=True)
class Panel:
    """What one method makes of an image.

    Attributes:
        caption: The method, and what came of it.
        right: Whether the answer is right; None where that is not known.
        kept: Raster indices of the visual tokens that stay.
        extra: Tokens beside them that stand for no single patch.
        cells: For a method that averages instead, (height, width) of its coarse grid.
    """

    caption: str
    right: bool | None = None
    kept: Sequence[int] = ()
    extra: int = 0
    cells: tuple[int, int] | None = None


def kept_tokens(
    image: Image | npt.NDArray[np.uint8],
    panels: Sequence[Panel],
    grid: tuple[int, int],
    *,
    title: str | None = None,
) -> Figure:
    """What methods keep of an image, drawn over it, after the image itself.

    Args:
        image: The image as the model sees it.
        panels: One for each method.
        grid: Rows and columns of the visual tokens.
        title: Title above all, such as the question.

    Returns:
        The figure.

    Raises:
        InputError: An index is not on the grid, there is no grid or no image, or a coarse grid is
            finer than its pixels.
        PoreError: matplotlib is not installed.
    """
    if min(grid) < 1:
        raise InputError(f"There is nothing to draw on a grid of {grid[0]}×{grid[1]}.")
    pixels = _pixels(image)
    shape = float(np.clip(pixels.shape[0] / pixels.shape[1], 1 / _LONGEST, _LONGEST))
    captions = [for_figure(panel.caption, 28, 3) for panel in panels]
    room = 0.85 + 0.16 * max((caption.count("\n") for caption in captions), default=0)
    with _style():
        from matplotlib.figure import Figure

        count = len(panels) + 1
        side = 2.05
        figure = Figure(figsize=(side * count + 0.2, side * shape + room), layout="constrained")
        axes = figure.subplots(1, count, squeeze=False)[0]
        # As long as the image, but for one that is much longer than wide.
        place: Any = {"extent": (0, grid[1], grid[0], 0), "aspect": shape * grid[1] / grid[0]}
        axes[0].imshow(pixels, **place)
        axes[0].set_title("image", fontsize=8.5, loc="center", fontweight="normal")
        for axis, panel, caption in zip(axes[1:], panels, captions, strict=True):
            if panel.cells is not None:
                shown = _averaged(pixels, panel.cells)
                note = f"averaged to {panel.cells[0]}×{panel.cells[1]}"
            else:
                mask = _mask(panel.kept, grid)
                shown = _dimmed(pixels, mask)
                note = f"{mask.sum()} of {mask.size} tokens"
                if panel.extra:
                    note += f", {panel.extra} of no one patch"
                _outline(axis, mask)
            axis.imshow(shown, **place)
            axis.set_xlabel(note, fontsize=7.5, color=_GREY)
            color, sign = _BLACK, ""
            if panel.right is not None:
                color, sign = (_GREEN, "  ✓") if panel.right else (_VERMILION, "  ✗")
            axis.set_title(
                caption + sign,
                fontsize=8.5,
                loc="center",
                color=color,
                fontweight="normal" if panel.right is None else "bold",
            )
        for axis in axes:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        if title is not None:
            _title(figure, title, 10)
    return figure


def layout(
    picture: Image,
    regions: Sequence[Regions],
    kept: Sequence[Sequence[int]] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Which part of a picture every visual token shows, drawn over it.

    Views that lie side by side, such as tiles, share a panel; those that overlap, such as the whole
    picture at low resolution, have panels of their own. Padding is hatched, and what no token shows
    is pale. A picture much longer than wide is stretched.

    Args:
        picture: The picture.
        regions: What `pore.regions.trace` found for it.
        kept: For every image of `regions`, the raster indices of the tokens that stay, as in
            `ImageReport.kept`; None for all.
        title: Title above all.

    Returns:
        The figure.

    Raises:
        InputError: `regions` are none or of a picture of another size, or `kept` does not fit them.
        PoreError: matplotlib is not installed.
    """
    width, height = picture.size
    boxes, masks = [], []
    if not regions:
        raise InputError("The picture has no regions, so there are no visual tokens to draw.")
    if kept is not None and len(kept) != len(regions):
        raise InputError(f"There are {len(regions)} images, but tokens kept of {len(kept)}.")
    for i, image in enumerate(regions):
        if image.size != (width, height):
            raise InputError(f"The regions are of a picture of {image.size}, not {picture.size}.")
        own = image.boxes.numpy()
        mask = np.ones(len(own), dtype=bool) if kept is None else _mask(kept[i], (1, len(own)))[0]
        for view in range(len(image.frames)):
            chosen = (image.views == view).numpy() & ~np.isnan(own).any(1)
            boxes.append(own[chosen])
            masks.append(mask[chosen])
    frames = np.concatenate([image.frames.numpy() for image in regions])
    layers = _layers(frames)
    if not layers:
        raise InputError("No region says which part of the picture it shows.")
    with _style():
        from matplotlib.figure import Figure

        spans, sizes = [], []
        for layer in layers:
            left, top = np.minimum(frames[layer, :2].min(0), 0)
            right, bottom = np.maximum(frames[layer, 2:].max(0), (width, height))
            shape = np.clip((right - left) / (bottom - top), 1 / _LONGEST, _LONGEST)
            spans.append((left, top, right, bottom))
            sizes.append(_SIDE * np.sqrt([shape, 1 / shape]))
        across, down = np.sum(sizes, 0)[0], np.max(sizes, 0)[1]
        figure = Figure(figsize=(across + 0.25 * len(layers), down + 0.75), layout="constrained")
        axes = figure.subplots(
            1, len(layers), squeeze=False, width_ratios=[float(size[0]) for size in sizes]
        )[0]
        for axis, layer, span, size in zip(axes, layers, spans, sizes, strict=True):
            cells = np.concatenate([boxes[view] for view in layer])
            mask = np.concatenate([masks[view] for view in layer])
            left, top, right, bottom = span
            scale = size / (right - left, bottom - top)
            _layer(axis, picture, frames[layer], cells, mask, scale)
            axis.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
            axis.set_aspect(scale[1] / scale[0])
            count = f"{mask.sum()} of {mask.size}" if kept is not None else f"{mask.size}"
            views = f"{len(layer)} tiles" if len(layer) > 1 else "one view"
            axis.set_xlabel(f"{views}, {count} tokens", fontsize=7.5, color=_GREY)
            axis.spines[:].set_visible(False)
        if title is not None:
            _title(figure, title, 9)
    return figure


def _layers(frames: npt.NDArray[np.float64]) -> list[list[int]]:
    """Put views together that lie side by side."""
    layers: list[list[int]] = []
    for view, frame in enumerate(frames):
        if not np.isnan(frame).any():
            free = (one for one in layers if not _overlap(frames[one], frame))
            layer = next(free, None)
            if layer is None:
                layers.append([view])
            else:
                layer.append(view)
    return layers


def _overlap(frames: npt.NDArray[np.float64], frame: npt.NDArray[np.float64]) -> bool:
    """Whether a view lies over one of some others, and by more than their edges are known to."""
    sides = np.minimum(frames[:, 2:], frame[2:]) - np.maximum(frames[:, :2], frame[:2])
    least = np.minimum(frames[:, 2:] - frames[:, :2], frame[2:] - frame[:2])
    return bool((sides > 0.05 * least).all(1).any())


def _layer(
    axis: Axes,
    picture: Image,
    frames: npt.NDArray[np.float64],
    cells: npt.NDArray[np.float64],
    kept: npt.NDArray[np.bool_],
    scale: npt.NDArray[np.float64],
) -> None:
    """A picture with its padding, views and tokens, at a scale of inches per pixel."""
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.patches import Rectangle

    width, height = picture.size
    for left, top, right, bottom in frames:
        corner, sides = (left, top), (right - left, bottom - top)
        axis.add_patch(
            Rectangle(corner, *sides, fc="#F2F2F2", ec="#C8C8C8", hatch="////", lw=0, zorder=0)
        )
    shown = picture.copy()
    shown.thumbnail((1400, 1400))
    pixels = np.asarray(shown.convert("RGB"))
    pale = (255 - 0.25 * (255 - pixels.astype(np.float64))).astype(np.uint8)
    place = (0, width, height, 0)
    axis.imshow(pale, extent=place, zorder=1, interpolation="nearest")
    over = axis.imshow(pixels, extent=place, zorder=2, interpolation="nearest")
    corners = cells[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    # What no kept token shows stays pale.
    over.set_clip_path(_union(cells[kept]), axis.transData)
    over.set_visible(bool(kept.any()))
    points = 72 * scale * (cells[:, 2:] - cells[:, :2])
    fine = float(np.clip(np.median(points) / 12, 0.1, 1)) if len(cells) else 1.0
    for color, line in (("white", 0.6), (_BLACK, 0.25)):  # to be seen on dark and on light
        outlines = PolyCollection(
            list(corners[kept]),
            facecolors="none",
            edgecolors=color,
            linewidths=fine * line,
            alpha=0.45,
        )
        outlines.set_zorder(3)
        axis.add_collection(outlines)
    if not kept.all():
        axis.add_collection(
            LineCollection(
                _rim(corners[kept]), colors=_BLUE, linewidths=max(0.9 * fine, 0.3), zorder=4
            )
        )
    for left, top, right, bottom in frames:
        sides = (right - left, bottom - top)
        axis.add_patch(
            Rectangle(
                (left, top), *sides, fc="none", ec=_VERMILION, lw=1.1, zorder=5, clip_on=False
            )
        )


def _union(boxes: npt.NDArray[np.float64]) -> Any:
    """A path around boxes."""
    from matplotlib.path import Path

    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3], [0, 1]]].reshape(-1, 2)
    return Path(corners, codes * len(boxes))


def _rim(corners: npt.NDArray[np.float64]) -> list[Any]:
    """The sides of boxes (n, 4, 2) that no two of them share."""
    sides: dict[Any, Any] = {}
    for box in corners:
        for a, b in zip(box, np.roll(box, -1, axis=0), strict=True):
            name = tuple(sorted((tuple(np.round(a, 3)), tuple(np.round(b, 3)))))
            if sides.pop(name, None) is None:
                sides[name] = (a, b)
    return list(sides.values())


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


def _mask(kept: Sequence[int], grid: tuple[int, int]) -> npt.NDArray[np.bool_]:
    mask = np.zeros(grid[0] * grid[1], dtype=bool)
    indices = np.asarray(list(kept), dtype=int)
    if indices.size and not 0 <= indices.min() <= indices.max() < mask.size:
        raise InputError(f"A kept token lies outside the grid of {grid[0]}×{grid[1]}.")
    mask[indices] = True
    return mask.reshape(grid)


def _dimmed(pixels: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """The image with dropped patches nearly white."""
    rows = np.arange(pixels.shape[0]) * mask.shape[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * mask.shape[1] // pixels.shape[1]
    kept = mask[rows[:, None], columns[None]][..., None]
    faded = 255 - 0.16 * (255 - pixels.astype(np.float64))
    return np.where(kept, pixels, faded).astype(np.uint8)


def _averaged(pixels: npt.NDArray[np.uint8], grid: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """The image averaged over the cells of a coarse grid."""
    if not (1 <= grid[0] <= pixels.shape[0] and 1 <= grid[1] <= pixels.shape[1]):
        height, width = pixels.shape[:2]
        raise InputError(
            f"An image of {height}×{width} pixels has no averages on a grid of {grid[0]}×{grid[1]}."
        )
    rows = np.linspace(0, pixels.shape[0], grid[0] + 1).round().astype(int)
    columns = np.linspace(0, pixels.shape[1], grid[1] + 1).round().astype(int)
    sums = np.add.reduceat(
        np.add.reduceat(pixels.astype(np.float64), rows[:-1], 0), columns[:-1], 1
    )
    areas = np.diff(rows)[:, None, None] * np.diff(columns)[None, :, None]
    averaged: npt.NDArray[np.uint8] = (sums / areas).astype(np.uint8)
    return averaged


def _outline(axis: Axes, mask: npt.NDArray[np.bool_]) -> None:
    """Lines around the kept tokens."""
    from matplotlib.collections import LineCollection

    padded = np.pad(mask, 1)
    across = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])
    down = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    lines = [((c, r), (c + 1, r)) for r, c in across.tolist()]
    lines += [((c, r), (c, r + 1)) for r, c in down.tolist()]
    axis.add_collection(LineCollection(lines, colors=_BLUE, linewidths=0.9, clip_on=False))


def _vector(values: npt.ArrayLike, n: int) -> npt.NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.shape != (n,):
        raise InputError(f"Expected {n} numbers, one per position, not {vector.shape}.")
    if np.isinf(vector).any() or (vector < 0).any():
        raise InputError("Attention and its standard errors are finite and not negative.")
    return vector


def _before_after(
    mean: npt.ArrayLike, bias: PositionBias
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Ā and Ā / P, each relative to its mean."""
    before = _vector(mean, len(bias))
    if np.isnan(before).any():
        raise InputError("The mean attention holds NaN, so there is nothing to draw.")
    if not before.any():
        raise InputError("The mean attention is zero everywhere, so there is nothing to draw.")
    before = before / before.max()  # of no size too large or small for a sum
    after = before / bias.values.numpy()
    return before / before.mean(), after / after.mean()


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
