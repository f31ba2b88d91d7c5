"""Names of methods and budgets in tables and figures, and the marks of methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pore.methods.registry import methods

UNPRUNED = "unpruned"
"""The method's name in the record of the unpruned model."""

TAUGHT, EXPERIMENTAL, GUIDED = "†", "‡", "§"
"""Marks of methods that look at attention that is better than in a real model, of methods built
from a paper's description, and of methods that a model guides, whose cost is not counted."""


def label(method: str, reweight: str | None) -> str:
    """A method in words, from the fields of its record.

    Args:
        method: The method's name.
        reweight: Kind of the position bias, or None.

    Returns:
        Such as "FastV", "FastV + PoRe" (a bias that was measured) or "FastV + RoPE prior".
    """
    if reweight is None:
        return method
    return f"{method} + {'RoPE prior' if reweight == 'rope' else 'PoRe'}"


def budget_label(keep: int | float | str | None) -> str:
    """A budget in words: "keep 25 %", "keep 128" for a count."""
    if keep is None:
        return "method's own budget"
    if isinstance(keep, str):
        return keep
    return f"keep {keep}" if isinstance(keep, int) else f"keep {100 * keep:.3g} %"


def marks(record: Mapping[str, Any], taught: int | None = None) -> str:
    """The marks of a method in a table, with a space before them.

    Args:
        record: A record of the method.
        taught: The first decoder layer whose attention is better than in a real model, if any.

    Returns:
        The marks, or nothing.
    """
    kind = methods().get(record["method"])
    marked = TAUGHT if taught is not None and max(record["looks_at"], default=-1) >= taught else ""
    marked += EXPERIMENTAL if kind is not None and kind.experimental else ""
    marked += GUIDED if record.get("guide") else ""
    return marked and f" {marked}"
