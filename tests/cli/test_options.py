"""Every command has the options, defaults and helps of `commands.json`, in this order."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from pore.cli.app import app
from pore.evaluation.reweighting import ROPE, UNCALIBRATED

GOLDEN = json.loads(Path(__file__).with_name("commands.json").read_text())
COMMANDS = {command.callback.__name__: command.callback for command in app.registered_commands}


def described(parameter: inspect.Parameter) -> dict[str, Any]:
    kind, info = get_args(parameter.annotation)
    # typer takes the first name for a default, until it reads the annotation.
    names = [*([] if info.default is ... else [info.default]), *(info.param_decls or ())]
    return {
        "name": parameter.name,
        "is": type(info).__name__.removesuffix("Info").lower(),
        "type": kind.__name__ if type(kind) is type else str(kind),
        "default": None if parameter.default is parameter.empty else str(parameter.default),
        "names": names,
        "help": info.help,
        "min": info.min,
        "max": info.max,
    }


def test_commands_are_in_their_order() -> None:
    assert list(COMMANDS) == list(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_options_are_as_they_were(name: str) -> None:
    command = COMMANDS[name]
    assert inspect.cleandoc(command.__doc__).splitlines() == GOLDEN[name]["help"]
    parameters = inspect.signature(command).parameters.values()
    assert list(map(described, parameters)) == GOLDEN[name]["parameters"]


def test_the_help_names_every_correction_without_calibration() -> None:
    (told,) = {
        parameter["help"]
        for command in GOLDEN.values()
        for parameter in command["parameters"]
        if parameter["name"] == "reweight"
    }
    for name in (ROPE, *UNCALIBRATED):
        assert f"'{name}'" in told
