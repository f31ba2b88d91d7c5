"""`typing.get_type_hints` works on what is public, as tools that read signatures need."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import pore
from pore import bench, engine
from pore.methods.registry import methods


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Functions, classes and methods; not `__init__`: a dataclass has its hints itself."""
    for name in dir(module):
        found = getattr(module, name)
        if name.startswith("_") or not callable(found):
            continue
        found = methods if inspect.ismodule(found) else found  # `pore.methods` is both
        yield name, found
        for part in dir(found) if inspect.isclass(found) else ():
            value = inspect.getattr_static(found, part)
            method = value.fget if isinstance(value, property) else value
            method = getattr(method, "__func__", method)
            if inspect.isfunction(method) and not part.startswith("_"):
                yield f"{name}.{part}", method


LAZY = ("table",)
"""What has a class in its hints that is slow to import."""

NAMES = [
    pytest.param(found, id=f"{module.__name__}.{name}")
    for module in (pore, engine, bench)
    for name, found in public(module)
    if name not in LAZY and found.__module__.startswith("pore.")
]


@pytest.mark.parametrize("found", NAMES)
def test_hints_are_found(found: Any) -> None:
    hints = typing.get_type_hints(found)
    assert inspect.isclass(found) or "return" in hints


def test_everything_public_is_tried() -> None:
    names = {case.id for case in NAMES}
    assert {"pore.calibrate", "pore.FastV", "pore.PositionBias.fit", "pore.engine.Stage"} <= names
    assert len(names) > 100
