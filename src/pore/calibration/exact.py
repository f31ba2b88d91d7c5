"""Exact sums: integers of any size, which add up to the same in any order.

Numbers from 0 to 2³⁰ are counted in units of 2⁻⁶², their squares in units of 2⁻¹²⁴; each number is
rounded once, when it is turned into units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_BITS = 62  # fractions in multiples of 2^-62 fit an int64


LARGEST = 1 << 30
"""The largest number that is summed."""

LEAST = 2.0**-40
"""Smaller numbers get the logarithm of this one: about 1e-12."""

_MAX_POSITIONS = 1 << 20


def units(rows: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 2³⁰ in units of 2⁻⁶², rounded once, as integers of any size.

    Args:
        rows: The numbers, float64, of any shape.

    Returns:
        An array of that shape with Python integers.
    """
    whole = np.floor(rows)
    rest = np.rint(np.ldexp(rows - whole, _BITS)).astype(np.int64).astype(object)
    found: np.ndarray = (whole.astype(np.int64).astype(object) << _BITS) + rest
    return found


def log_units(rows: np.ndarray) -> np.ndarray:
    """How far the logarithms of numbers lie above that of the least, in units of 2⁻⁶².

    Args:
        rows: Numbers up to 2³⁰, float64, of any shape; less than `LEAST` counts as that.

    Returns:
        An array of that shape, of Python's integers, none negative.
    """
    return units(np.log(np.maximum(rows, LEAST) / LEAST))


def geometric_mean(sums: Sequence[int], count: int) -> list[float]:
    """The geometric means of `count` numbers each.

    Args:
        sums: Sums of what `log_units` gives.
        count: How many numbers are in each.

    Returns:
        The means.
    """
    return [LEAST * math.exp(each) for each in mean(sums, count)]


def mean(sums: Sequence[int], count: int) -> list[float]:
    """The means of `count` numbers each.

    Args:
        sums: Sums of units.
        count: How many numbers are in each.

    Returns:
        The means, rounded once.
    """
    return [total / (count << _BITS) for total in sums]


def deviation(sums: Sequence[int], squares: Sequence[int], count: int) -> list[float]:
    """The standard deviations of `count` numbers each, at least two, without cancellation.

    Args:
        sums: Sums of units.
        squares: Sums of their squares.
        count: How many numbers are in each.

    Returns:
        The standard deviations.
    """
    scale = (count * (count - 1)) << (2 * _BITS)
    return [
        math.sqrt((count * square - total * total) / scale)
        for total, square in zip(sums, squares, strict=True)
    ]


def largest_sum(count: int) -> int:
    """The largest sum of `count` numbers from 0 to 2³⁰, in units."""
    return (count * LARGEST) << _BITS


def check(
    sums: Sequence[Any], squares: Sequence[Any], count: int, grid: tuple[int, int] | None
) -> None:
    """Refuse sums that `count` numbers from 0 to 2³⁰ cannot have.

    Args:
        sums: Sums of any origin, one for every position.
        squares: Sums of squares, likewise.
        count: How many numbers are in each.
        grid: Rows and columns of the positions, if known.

    Raises:
        ValueError: No numbers have these sums.
    """
    if len(sums) != len(squares) or (sums and not count) or len(sums) > _MAX_POSITIONS:
        raise ValueError("sums and squares must have one number for every position.")
    if grid is not None and (min(grid) < 1 or grid[0] * grid[1] != len(sums)):
        raise ValueError("the grid does not have as many positions as there are sums.")
    largest = largest_sum(1)
    for total, square in zip(sums, squares, strict=True):
        if not (type(total) is int and type(square) is int and 0 <= total <= largest_sum(count)):
            raise ValueError("a sum cannot be a sum of attention.")
        if not total * total <= count * square <= count * total * largest:
            raise ValueError("a sum of squares contradicts its sum.")
