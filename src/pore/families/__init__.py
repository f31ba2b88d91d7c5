"""The families of models, one adapter a file.

Every file of this folder is imported here, so that its adapter is known: a family needs no other
line than its own file.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
