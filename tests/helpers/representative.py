"""Which pairs of method and family run at every change; the others are marked slow."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest

from cases import CASES
from cases.base import Case
from helpers.families import refusal
from helpers.methods import EVERY

EVERYWHERE = "FastV"
"""The method that runs in every family."""
OTHERS = 2
"""How many more methods run in each family."""


@cache
def chosen() -> dict[tuple[str, str], int]:
    """The pairs of a family and a method that run at every change, numbered.

    Besides `EVERYWHERE`, each family gets those of its methods that earlier families got least
    often, so that every method occurs.
    """
    used: Counter[str] = Counter()
    pairs: list[tuple[str, str]] = []
    for case in CASES:
        taken = [name for name in EVERY if name != EVERYWHERE and refusal(case, name) is None]
        least = sorted(taken, key=lambda name: (used[name], name))[:OTHERS]
        used.update(least)
        pairs += [(case.name, name) for name in (EVERYWHERE, *least)]
    return {pair: number for number, pair in enumerate(pairs)}


def marks(case: Case, name: str, situation: int | None = None, side: str | None = None) -> Any:
    """The marks of a test of a method in a family: none if it runs at every change.

    A chosen pair runs in every situation if the method is `EVERYWHERE`, otherwise in one, and there
    with padding on one side. Situation and side change from pair to pair.

    Args:
        case: The family.
        name: The method.
        situation: Number of the situation among `helpers.families.PROMPTS`; None for all.
        side: The side of the padding; None for both.
    """
    number = chosen().get((case.name, name))
    runs = number is not None
    if number is not None and situation is not None:
        runs = name == EVERYWHERE or situation == 1 + number % 3
        runs &= side in (None, ("left", "right")[(number + situation) % 2])
    return () if runs else pytest.mark.slow
