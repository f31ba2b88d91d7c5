"""Makes a method from its name and settings, for the command line and evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, fields, replace
from typing import Any

from torch import nn

from pore.engine.pruner import Pruner
from pore.errors import InputError, UnsupportedModelError
from pore.families.registry import sizes_of
from pore.methods.budgets import scheduled
from pore.methods.registry import method_named
from pore.methods.settings import check_names, how_else, read_settings


def make(
    method: type[Pruner] | str,
    model: nn.Module,
    keep: int | float,
    *,
    average: bool = False,
    visual: int | None = None,
    shares: bool = False,
    texts: Sequence[str] = (),
    **settings: Any,
) -> Pruner:
    """A method as its authors set it up for a model, except for the settings that are given.

        make("fastv", model, 64, layer=3)
        make("HiPrune", model, 0.25, texts=["alpha=0.2", "faithful=true"])

    Args:
        method: The method, or its name in any case of letters.
        model: The model that it will prune. If it is of no family, nothing can be scaled to its
            sizes, and the method gets its defaults.
        keep: Visual tokens left per image (int), or the fraction (float).
        average: Whether `keep` is the mean over the decoder layers, as in `pore.schedule`, rather
            than what is left at the end.
        visual: With `average`, visual tokens of an image, as in `pore.schedule`.
        shares: With `average` and a fraction, whether every image is to average that fraction of
            its own tokens, where images differ in their number.
        texts: Settings as text, NAME=VALUE each, see `read_settings`.
        **settings: Settings by name; those that are None count as not given.

    Returns:
        The method.

    Raises:
        InputError: There is no such method or setting, a setting is given twice, or one is missing
            that has no default; the message says how to give it.
        BudgetError: The budget cannot be met.
        UnsupportedModelError: `average` is set, but the sizes of the model are not known.
    """
    kind = method_named(method) if isinstance(method, str) else method
    values = read_settings(kind, texts)
    for name, value in settings.items():
        if value is not None:
            check_names(kind, [name])
            if name in values:
                raise InputError(f"{name} is given twice, by --{name} and by --set.")
            values[name] = value
    guide = {"guide": values.get("guide")} if kind.guided else {}
    shape = None
    with suppress(UnsupportedModelError):
        shape = sizes_of(model)

    def made(budget: int | float) -> Pruner | None:
        found = None if shape is None else kind.usual(budget, shape, **guide)
        return None if found is None else replace(found, **values)  # type: ignore[type-var]

    if average:
        if "keep" in values:
            raise InputError("--average finds the budget itself; leave --set keep=... out.")
        own = shares and isinstance(keep, float)
        return scheduled(made, kind.name, shape or sizes_of(model), keep, visual, shares=own)
    found = made(keep)
    if found is None:
        _check_complete(kind, {"keep", *values})
        found = kind(**{"keep": keep, **values})
    return found


def _check_complete(kind: type[Pruner], given: set[str]) -> None:
    """Refuse to make a method if settings without a default are missing."""
    own: tuple[Field[Any], ...] = fields(kind)  # type: ignore[arg-type]
    needed = [
        field.name
        for field in own
        if field.default is MISSING and field.default_factory is MISSING and field.name not in given
    ]
    for name in needed:
        if (how := how_else(kind, name)) is not None:
            raise InputError(f"{kind.name} needs a {name}: {how}.")
    if needed:
        raise InputError(
            f"{kind.name} needs more than a budget: "
            + ", ".join(f"--set {name}=..." for name in sorted(needed))
            + "."
        )
