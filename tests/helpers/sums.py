"""Calibrations of images whose bias is put in by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import pore
from pore.bias.coordinates import Over
from pore.bias.where import Where
from pore.calibration.batch import Batch
from pore.calibration.sums import Calibration
from pore.calibration.table import Rows, Table
from pore.data.samples import Sample
from pore.layout import Image, Layout

GRID = (12, 12)


N = GRID[0] * GRID[1]


WHERE = np.linspace(0, 1, N)
"""How far into the image every position is."""


def attention_of(bias: np.ndarray, images: int, noise: float = 0.6, seed: int = 0) -> np.ndarray:
    """(images, N) attention with a bias, log-normal around it."""
    random = np.random.default_rng(seed)
    rows = bias * np.exp(noise * random.standard_normal((images, len(bias))))
    return rows / rows.sum(1, keepdims=True) * 0.3


def sums_of(rows: np.ndarray) -> Calibration:
    """The sums over images of `GRID`.

    Args:
        rows: (images, N) their attention.

    Returns:
        The calibration.
    """
    images = len(rows)
    side = (np.arange(GRID[0]) + 0.5) / GRID[0]
    place = np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(N, 2)
    read = Rows(
        GRID,
        rows,
        np.arange(images),
        np.broadcast_to(np.arange(N)[::-1] + 8, (images, N)),
        np.broadcast_to(place, (images, N, 2)),
    )
    empty = Calibration(pore.Provenance(layer=2), "float32", ("",), samples=b"", table=Table())
    marks = np.random.default_rng(1).bytes(12 * images)
    samples = [Sample(str(number), None, "w6") for number in range(images)]
    return empty.including(Batch(samples, marks, [read], []))


# -- images of several sizes ---------------------------------------------------------------------

GRIDS = [(6, 6), (12, 9), (9, 12), (24, 24), (4, 30)]
"""Those of images of several sizes."""


def layout_of(grid: tuple[int, int], after: int) -> Layout:
    """One image of a grid, 3 tokens before it and some after it."""
    tokens = grid[0] * grid[1]
    image = Image(0, 0, range(3, 3 + tokens), grid=grid)
    return Layout.of([image], torch.ones(1, 3 + tokens + after, dtype=torch.bool))


def true_bias(over: Over, layout: Layout) -> np.ndarray:
    """(1, N) a bias of each kind, which no image size is part of."""
    where = Where(layout)
    if over == "distance":
        return (0.3 + np.exp(-where.distance.numpy() / 60.0)) * 1.0
    if over == "raster":
        return np.exp(2 * (where.raster.numpy() + 0.5) / layout.columns.shape[1])
    place = where.place.numpy()
    return np.exp(1.5 * place[..., 0]) * (1 + (place[..., 1] - 0.5) ** 2 * 4)


def measured(over: Over, grids: Any = GRIDS, count: int = 40, noise: float = 0.0) -> Calibration:
    """What calibration makes of images of several sizes with that bias, and of noise."""
    random = np.random.default_rng(0)
    state = Calibration(pore.Provenance(layer=2), "float32", ("",), samples=b"", table=Table())
    for number in range(count):
        grid = grids[number % len(grids)]
        layout = layout_of(grid, 5 + int(random.integers(20)))
        where = Where(layout)
        attention = true_bias(over, layout)
        attention = attention * np.exp(noise * random.standard_normal(attention.shape))
        # How much of the attention goes to the image is another matter, and so is its size.
        attention = attention / attention.sum() * random.uniform(0.2, 0.5)
        rows = Rows(grid, attention, np.zeros(1, int), where.distance.numpy(), where.place.numpy())
        sample = Sample(str(number), None, "w6")
        state = state.including(Batch([sample], number.to_bytes(12, "little"), [rows], []))
    return state
