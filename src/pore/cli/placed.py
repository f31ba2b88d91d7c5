"""The model as the first word of a command that has nothing but options: `pore bench MODEL`."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter
from typing import Annotated, Any, get_args

import typer
from typer.models import ArgumentInfo, OptionInfo

from pore.cli import completing
from pore.cli.config_file import PLACED
from pore.errors import InputError

_Placed = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        autocompletion=completing.models,
        show_default=False,
        help="The model, as by --model.",
    ),
]


def placed(hints: Mapping[str, Any]) -> list[Parameter]:
    """The further parameter of a command, if it takes a model as an option and no other word.

    Args:
        hints: The annotations of its parameters.
    """
    kinds = {name: get_args(kind)[1] for name, kind in hints.items()}
    words = [one for one in kinds.values() if isinstance(one, ArgumentInfo)]
    if words or not isinstance(kinds.get("model"), OptionInfo):
        return []
    return [Parameter(PLACED, Parameter.KEYWORD_ONLY, default=None, annotation=_Placed)]


def model_of(given: Mapping[str, Any]) -> Any:
    """The model that was named, by --model or as the first word.

    Args:
        given: What the command was given, with its context.

    Raises:
        InputError: It was named in both ways.
    """
    if given.get(PLACED) is None:
        return given["model"]
    source = given["context"].get_parameter_source("model")
    if source is not None and source.name == "COMMANDLINE":
        raise InputError(f"The model is named twice, {given[PLACED]} and with --model.")
    return given[PLACED]
