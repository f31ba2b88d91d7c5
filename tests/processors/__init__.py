"""Each family's own processor with the settings of its checkpoints, and a model that fits it.

A file a family, of the same name as its adapter's in `src/pore/families/`; its `KINDS` are found.
"""

from importlib import import_module
from pkgutil import iter_modules

from processors.base import Kind

KINDS: list[Kind] = [
    kind
    for module in iter_modules(__path__)
    for kind in getattr(import_module(f"{__name__}.{module.name}"), "KINDS", [])
]
