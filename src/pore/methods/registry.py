"""Every method by name: those of this folder, and those of other packages."""

from __future__ import annotations

import pkgutil
import re
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module, metadata

from pore.engine.pruner import Pruner
from pore.errors import InputError, PoreError


@cache
def built_in() -> Mapping[str, type[Pruner]]:
    """The methods that the files of this folder define, by the names of their classes."""
    package = sys.modules[__name__.rpartition(".")[0]]
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        import_module(module.name)
    kinds = sorted(Pruner.registry.values(), key=lambda kind: kind.__name__)
    return {k.__name__: k for k in kinds if k.__module__.startswith(f"{package.__name__}.")}


@cache
def _load_entry_points() -> None:
    for entry in metadata.entry_points(group="pore.methods"):
        kind = entry.load()
        if not (isinstance(kind, type) and issubclass(kind, Pruner)):
            raise PoreError(
                f"Entry point {entry.name!r} of group 'pore.methods' gives {kind!r}, "
                "which is not a subclass of pore.Pruner."
            )


def methods() -> dict[str, type[Pruner]]:
    """All methods by name, built in or from the entry points `pore.methods`.

    Returns:
        The class of every method.

    Raises:
        PoreError: An entry point does not give a `Pruner`.
    """
    _load_entry_points()
    return dict(sorted(Pruner.registry.items()))


def method_named(name: str) -> type[Pruner]:
    """A method by its name or by that of its class, whatever the case of letters and hyphens.

    Args:
        name: Such as "fastv", "IVC-Prune" or "IVCPrune".

    Returns:
        Its class.

    Raises:
        InputError: There is none.
    """
    kinds = methods()
    keys = {_key(each): kind for known, kind in kinds.items() for each in (known, kind.__name__)}
    if _key(name) not in keys:
        near = get_close_matches(_key(name), keys, 1)
        meant = f" Did you mean {keys[near[0]].name!r}?" if near else ""
        raise InputError(f"There is no method {name!r}.{meant} There are {', '.join(kinds)}.")
    return keys[_key(name)]


def _key(name: str) -> str:
    """What of a name tells methods apart."""
    return re.sub("[-_ ]", "", name).lower()
