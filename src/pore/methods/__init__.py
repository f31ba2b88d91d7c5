"""The pruning methods, one published method a file, and what they have in common.

A file that defines a method is named nowhere: `registry` imports whatever lies in this folder.
"""

import sys
from types import ModuleType

from pore.engine.pruner import Pruner
from pore.methods.registry import built_in, methods

built_in()

__all__ = ["built_in", "methods"]


class _Methods(ModuleType):
    """This folder, which can be called: Python names it `pore.methods`, as the function is."""

    def __call__(self) -> dict[str, type[Pruner]]:
        return methods()


sys.modules[__name__].__class__ = _Methods
