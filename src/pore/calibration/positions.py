"""Sums over images of one size, for every position."""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from pore.calibration import exact
from pore.calibration.table import Rows


class Half(NamedTuple):
    """One half of the images.

    Attributes:
        images: How many there are.
        sums: For each position the sum of their attention, in units of 2⁻⁶².
        logs: For each position the sum of its logarithm, as `exact.log_units` gives it.
        log_squares: For each position the sum of the square of that.
    """

    images: int
    sums: tuple[int, ...]
    logs: tuple[int, ...]
    log_squares: tuple[int, ...]

    def plus(self, other: Half) -> Half:
        """With more images."""
        added = (_added(a, b) for a, b in zip(self[1:], other[1:], strict=True))
        return Half(self.images + other.images, *added)


class Head(NamedTuple):
    """One head, over all images.

    Attributes:
        sums: As in `Half`.
        logs: As in `Half`.
    """

    sums: tuple[int, ...]
    logs: tuple[int, ...]


@dataclass(frozen=True)
class PositionSums:
    """What `Calibration` holds for every position, by the same names; empty if sizes differ."""

    grid: tuple[int, int] | None = None
    sums: tuple[int, ...] = ()
    squares: tuple[int, ...] = ()
    halves: tuple[Half, Half] | None = None
    heads: tuple[Head, ...] | None = None

    @classmethod
    def of(cls, rows: Rows, halves: np.ndarray) -> PositionSums:
        """The sums of images of one size.

        Args:
            rows: What was read for the images.
            halves: (n,) which half each image is in.
        """
        units, logs = exact.units(rows.attention), exact.log_units(rows.attention)
        both = tuple(
            Half(int(mine.sum()), *map(_sum_of, (units[mine], logs[mine], logs[mine] ** 2)))
            for mine in (halves == 0, halves == 1)
        )
        heads = None
        if rows.heads is not None:
            of_heads = (exact.units(rows.heads).sum(0), exact.log_units(rows.heads).sum(0))
            heads = tuple(Head(tuple(a), tuple(b)) for a, b in zip(*of_heads, strict=True))
        return cls(
            rows.grid,
            tuple(units.sum(0)),
            tuple((units * units).sum(0)),
            both,  # type: ignore[arg-type] # of two
            heads,
        )

    def of_one_size_with(self, other: PositionSums) -> bool:
        """Whether the other sums are over images of the same size."""
        return self.grid == other.grid and len(self.sums) == len(other.sums)

    def plus(self, other: PositionSums) -> PositionSums:
        """The sums over the images of both, all of one size; what only one has is dropped."""
        halves = heads = None
        if self.halves is not None and other.halves is not None:
            halves = tuple(a.plus(b) for a, b in zip(self.halves, other.halves, strict=True))
        if self.heads is not None and other.heads is not None:
            heads = tuple(
                Head(_added(a.sums, b.sums), _added(a.logs, b.logs))
                for a, b in zip(self.heads, other.heads, strict=True)
            )
        return PositionSums(
            self.grid,
            _added(self.sums, other.sums),
            _added(self.squares, other.squares),
            halves,  # type: ignore[arg-type] # of two
            heads,
        )

    @property
    def entries(self) -> dict[str, Any]:
        """The fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def halves_of(value: Any, positions: int, count: int) -> tuple[Half, Half] | None:
    """The halves in JSON of any origin; ValueError if it holds none."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("there must be two halves.")
    halves = (_half(value[0], positions), _half(value[1], positions))
    if positions and halves[0].images + halves[1].images != count:
        raise ValueError("the halves do not have as many images as there are.")
    return halves


def heads_of(value: Any, positions: int, count: int) -> tuple[Head, ...] | None:
    """The sums of heads in JSON of any origin; ValueError if it holds none."""
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise ValueError("heads must be lists of sums.")
    if not all(isinstance(head, list) and len(head) == 2 for head in value):
        raise ValueError("a head must have sums and sums of logarithms.")
    return tuple(Head(*(_sums(each, positions, count) for each in head)) for head in value)


def _half(value: Any, positions: int) -> Half:
    if not isinstance(value, list) or len(value) != 4 or type(value[0]) is not int or value[0] < 0:
        raise ValueError("a half must be a number of images, and sums over them.")
    images, *sums = value
    return Half(images, *(_sums(each, positions, images) for each in sums))


def _sums(sums: Any, positions: int, count: int) -> tuple[int, ...]:
    most = exact.largest_sum(count) << 70  # a square has twice the units
    if not isinstance(sums, list) or len(sums) != positions:
        raise ValueError("a half or a head must have one sum for every position.")
    if not all(type(x) is int and 0 <= x <= most for x in sums):
        raise ValueError("a sum of a half or a head cannot be a sum of attention.")
    return tuple(sums)


def _sum_of(units: np.ndarray) -> tuple[int, ...]:
    # If there are no rows, their sum is a single 0.
    return tuple(units.sum(0, initial=0) + np.zeros(units.shape[1], dtype=object))


def _added(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(operator.add, one, other))
