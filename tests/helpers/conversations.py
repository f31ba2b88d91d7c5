"""Positions for tests of conversations."""

from __future__ import annotations

from torch import Tensor

from cases.base import Case
from pore.families.registry import family_of


def positions(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """(..., B, L) positions of a whole conversation."""
    model = case.model()
    if family_of(model).mrope:
        found: Tensor = model.model.get_rope_index(**inputs)[0]
        return found
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
