"""One tiny random model of every family, made from its own config class, with prompts for it.

Every family has one file, with the same name as its adapter's in `src/pore/families/`. Every
subclass of `Case` in it that sets a `name` is a case: no list names them.
"""

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from cases.base import Case

_MODULES = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]


def _found() -> list[Case]:
    return [
        kind()
        for module in _MODULES
        for kind in vars(module).values()
        if isinstance(kind, type)
        and issubclass(kind, Case)
        and kind.__module__ == module.__name__
        and "name" in vars(kind)
    ]


_EVERY = _found()
CASES = [case for case in _EVERY if not case.cousin]
COUSINS = [case for case in _EVERY if case.cousin]

PUBLISHED: dict[str, Callable[[], Any]] = {}
"""Configs of the size of real models, by name; see `cases.base.of`."""
for _module in _MODULES:
    PUBLISHED.update(getattr(_module, "PUBLISHED", {}))
