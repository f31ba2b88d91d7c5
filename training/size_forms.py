"""Which form of P holds for pictures of sizes that it was not fitted to.

P is fitted to calibration pictures of two sizes and tried on those of the third. ln A is fitted by
least squares, with a separate constant for every question, because attention thins out as pictures
grow and the scale of P does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from attention_rows import LAYERS, Rows
from kept_objects import budgets, result
from log_curves import spline
from offline_corrections import Floats, LayerRows, at_layer, halves
from scipy.ndimage import zoom

OWN = "its own geometric mean"
KNOTS = 4
"""Inner knots along rows and along columns."""
NEAR, FAR = 10, 700
"""Distances between which the knots of a spline in the logarithm of the distance lie."""


@dataclass(frozen=True)
class Places:
    """Where Q · N visual tokens lie, each ``(Q, N)``.

    Attributes:
        distance: Tokens from a visual token to the last one of the prompt.
        raster: Place in reading order, from 0 to 1.
        row: Place from top to bottom, from 0 to 1.
        column: Place from left to right, from 0 to 1.
    """

    distance: Floats
    raster: Floats
    row: Floats
    column: Floats

    @classmethod
    def of(cls, rows: Rows) -> Places:
        """The places of all visual tokens of some records."""
        n = rows.patches.shape[1]
        side = round(n**0.5)
        index = np.broadcast_to(np.arange(n), rows.patches.shape)
        return cls(
            (rows.after[:, None] + n - 1 - index).astype(np.float64),
            index / (n - 1),
            index // side / (side - 1),
            index % side / (side - 1),
        )


def _one(values: Floats) -> Floats:
    return values[..., None]


def _spline(values: Floats, knots: int) -> Floats:
    return spline(values.reshape(-1), knots).reshape(*values.shape, -1)


def _nearness(distance: Floats) -> Floats:
    """The logarithm of the distance, from 0 at `NEAR` to 1 at `FAR`."""
    found: Floats = np.log(distance / NEAR) / np.log(FAR / NEAR)
    return found


def _axes(places: Places) -> Floats:
    return np.concatenate([_spline(places.row, KNOTS), _spline(places.column, KNOTS)], -1)


FORMS: Mapping[str, Callable[[Places], Floats]] = {
    "distance, exponential": lambda p: _one(p.distance),
    "distance, power": lambda p: _one(_nearness(p.distance)),
    "distance, spline of its logarithm": lambda p: _spline(_nearness(p.distance), KNOTS),
    "raster place, exponential": lambda p: _one(p.raster),
    "raster place, spline": lambda p: _spline(p.raster, 7),
    "row x column, splines": _axes,
    "distance and row x column": lambda p: np.concatenate(
        [_axes(p), _spline(_nearness(p.distance), KNOTS)], -1
    ),
}
"""By name, functions from places to ``(Q, N, C)`` columns; ln P is a combination of them."""


@dataclass(frozen=True)
class Size:
    """Records of pictures of one size at one layer."""

    rows: LayerRows
    places: Places
    patches: Any

    @classmethod
    def of(cls, rows: Rows, layer: int) -> Size:
        """The records of one layer with their places."""
        return cls(at_layer(rows, layer), Places.of(rows), rows.patches)


def _centred(values: Floats) -> Floats:
    found: Floats = values - values.mean(1, keepdims=True)
    return found


def fit(sizes: Sequence[Size], form: Callable[[Places], Floats]) -> Floats:
    """``(C,)``: the combination of a form's columns nearest to ln A; all sizes count equally."""
    square, product = 0.0, 0.0
    for size in sizes:
        columns = _centred(form(size.places))
        logs = _centred(np.log(size.rows.scores.astype(np.float64)))
        square = square + np.einsum("qnc,qnd->cd", columns, columns) / logs.size
        product = product + np.einsum("qnc,qn->c", columns, logs) / logs.size
    # Columns of a spline add up to 1, so they cannot be told from the constant.
    found: Floats = np.linalg.lstsq(np.asarray(square), np.asarray(product), rcond=1e-9)[0]
    return found


def bias(size: Size, form: Callable[[Places], Floats], weights: Floats) -> Floats:
    """``(Q, N)``: P for every visual token."""
    found: Floats = np.exp(_centred(form(size.places) @ weights))
    return found


def resized(sizes: Sequence[Size], n: int) -> Floats:
    """``(N,)``: geometric means of other sizes, interpolated linearly on this grid."""
    side = round(n**0.5)
    found = []
    for size in sizes:
        logs = _centred(size.rows.log_mean[None])[0]
        own = round(len(logs) ** 0.5)
        square = logs.reshape(own, own)
        found.append(zoom(square, side / own, order=1, mode="nearest", grid_mode=True))
    result: Floats = np.exp(np.mean(found, 0).reshape(-1))
    return result


def error(size: Size, p: Floats) -> float:
    """Standard deviation over positions of how far ln P is from the mean of ln A, both centred."""
    difference = np.log(size.rows.scores.astype(np.float64)) - np.log(p)
    return float(_centred(difference).mean(0).std())


def judge(known: Size, asked: Size, make: Callable[[Size], Floats]) -> dict[str, Any]:
    """What a P does on a size: error on its calibration questions, what it keeps of test ones."""
    scores = asked.rows.scores
    keeps = budgets(scores.shape[1])
    made = scores / make(asked)
    return {
        "held_out_error": round(error(known, make(known)), 4),
        "results": {str(k): result(made, scores, asked.patches, k) for k in keeps},
    }


def own_error(known: Size) -> float:
    """The error of the size's own geometric mean of one half on the other half: mere noise."""
    one, other = halves(len(known.rows.scores))
    logs = np.log(known.rows.scores.astype(np.float64))
    difference = logs[one].mean(0) - logs[other].mean(0)
    return round(float(difference.std()), 4)


def tried_on(known: Mapping[int, Size], asked: Size, n: int) -> dict[str, Any]:
    """All forms on pictures of `n` tokens, fitted to the other sizes and fitted to all."""
    others = [size for m, size in known.items() if m != n]
    flat, own = np.ones(n), np.exp(known[n].rows.log_mean)
    stretched = resized(others, n)
    found = {
        "none": judge(known[n], asked, lambda _: flat),
        OWN: judge(known[n], asked, lambda _: own) | {"held_out_error": own_error(known[n])},
        "others' geometric means, resized": judge(known[n], asked, lambda _: stretched),
    }
    for name, form in FORMS.items():
        for which, sizes in (("", others), (", all sizes", [*known.values()])):
            make = partial(bias, form=form, weights=fit(sizes, form))
            found[name + which] = judge(known[n], asked, make)
    return found


def compare(calibration: Mapping[int, Rows], test: Mapping[int, Rows]) -> dict[str, Any]:
    """All forms at all layers, tried on every size."""
    found: dict[str, Any] = {}
    for layer in LAYERS:
        known, asked = (
            {n: Size.of(rows, layer) for n, rows in records.items()}
            for records in (calibration, test)
        )
        found[f"K = {layer + 1}"] = {str(n): tried_on(known, asked[n], n) for n in known}
    return found


def show(found: dict[str, Any]) -> None:
    """Print the tables."""
    for layer, sizes in found.items():
        for n, forms in sizes.items():
            print(f"\n{layer}, tried on {n}")
            for name, one in forms.items():
                cells = [
                    f"{r['kept']:5.1f} {r['difference']:+5.1f} ± {r['half_width']:3.1f}"
                    for r in one["results"].values()
                ]
                print(f"  {name:46} {one['held_out_error']:6.3f}", " | ".join(cells))
