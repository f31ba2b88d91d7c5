"""Which family takes which method, derived from what both say of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pore.cost.named import SHAPES
from pore.engine.stages import Limit
from pore.families.base import Family
from pore.families.registry import families
from pore.methods.registry import methods

_KEEP = 64  # of any number that a model can have; limits do not depend on it


_SHAPE = SHAPES["llava-1.5-7b"]  # of a depth that every method can be set up for


@dataclass(frozen=True)
class Support:
    """One family, and what it takes of every method.

    Attributes:
        family: The adapter.
        model_types: The `config.model_type` of its models.
        limits: Of every method by name, what the family does not take of it; empty where it works.
            Methods that need more than a model to be set up are left out.
    """

    family: Family
    model_types: tuple[str, ...]
    limits: Mapping[str, tuple[Limit, ...]]

    @property
    def takes(self) -> list[str]:
        """The methods that work, if only with some of the images or layers."""
        return [name for name, found in self.limits.items() if all(one.unless for one in found)]

    def to_dict(self) -> dict[str, Any]:
        """The entry as plain JSON types."""
        return {
            "family": self.family.name,
            "model_types": list(self.model_types),
            "methods": {
                name: {"works": name in self.takes, "limits": [asdict(one) for one in found]}
                for name, found in self.limits.items()
            },
        }


def support() -> list[Support]:
    """Every family with what it takes of every method, as its authors set it up.

    Nothing is listed here: methods say what they need in `Pruner.stages` and `Pruner.limits`,
    families what they have, and a run is refused by the same.

    Returns:
        One entry for each family, by name.
    """
    usual = {name: kind.usual(_KEEP, _SHAPE) for name, kind in methods().items()}
    by_kind: dict[type[Family], list[str]] = {}
    for model_type, family in families().items():
        by_kind.setdefault(type(family), []).append(model_type)
    found = []
    for kind, model_types in by_kind.items():
        family = kind()
        limits = {
            name: tuple(pruner.limits(family))
            for name, pruner in usual.items()
            if pruner is not None
        }
        found.append(Support(family, tuple(model_types), limits))
    return sorted(found, key=lambda one: one.family.name.lower())
