"""Which family takes which method, derived from what both say about themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pore.cost.named import SHAPES
from pore.engine.stages import Limit
from pore.families.base import Family
from pore.families.registry import families
from pore.methods.registry import methods

_KEEP = 64  # any number that a model can have: limits do not depend on it


_SHAPE = SHAPES["llava-1.5-7b"]  # deep enough to set up every method


@dataclass(frozen=True)
class Support:
    """One family, and how far it takes every method.

    Attributes:
        family: The adapter.
        model_types: The `config.model_type` of its models.
        limits: For every method by name, what it cannot do in the family; empty if it works.
            Methods for videos alone, those that need more than a model to be set up, and those that
            act on pictures are omitted.
    """

    family: Family
    model_types: tuple[str, ...]
    limits: Mapping[str, tuple[Limit, ...]]

    @property
    def takes(self) -> list[str]:
        """The methods that work, even if only with some images or layers."""
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
    """Every family and how far it takes every method, set up as by the method's authors.

    There is no list to edit: methods say what they need in `Pruner.stages` and `Pruner.limits`,
    families what they have, and runs are refused for the same reasons.

    Returns:
        One entry for each family, by name.
    """
    named = {name: kind for name, kind in methods().items() if not kind.resizes}
    usual = {name: kind.usual(_KEEP, _SHAPE) for name, kind in named.items()}
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
