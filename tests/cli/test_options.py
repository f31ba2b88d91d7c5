"""Every command has the options, defaults and helps of `commands.json`, in this order."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, get_args

import pytest

from helpers.command_line import run
from pore.cli.app import COMMANDS as LISTED
from pore.cli.app import function_of
from pore.cli.config_file import PLACED
from pore.cli.options import everywhere
from pore.evaluation.reweighting import ROPE, UNCALIBRATED

GOLDEN = json.loads(Path(__file__).with_name("commands.json").read_text())
COMMANDS = {name: function_of(name) for name in LISTED}
SHARED = {PLACED, *(one.name for one in everywhere(config=True))}
"""What every command has, or every one that takes a file of options."""


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
    own = [one for one in parameters if one.name not in SHARED]
    assert list(map(described, own)) == GOLDEN[name]["parameters"]


@pytest.mark.parametrize("name", LISTED)
def test_the_list_of_commands_has_the_first_line_of_their_help(name: str) -> None:
    assert inspect.cleandoc(COMMANDS[name].__doc__ or "").splitlines()[0] == LISTED[name]
    assert len(LISTED[name]) <= 64  # a line of the list in a terminal of 80 columns


@pytest.mark.parametrize("name", LISTED)
def test_every_command_has_what_stands_anywhere(name: str) -> None:
    parameters = inspect.signature(COMMANDS[name]).parameters
    assert {"debug", "verbose", "quiet"} <= parameters.keys()
    files = name in ("demo", "calibrate", "generate", "evaluate", "bench", "serve")
    assert ({"config", "save_config"} <= parameters.keys()) == files


def test_the_help_names_every_correction_without_calibration() -> None:
    (told,) = {
        parameter["help"]
        for command in GOLDEN.values()
        for parameter in command["parameters"]
        if parameter["name"] == "reweight"
    }
    for name in (ROPE, *UNCALIBRATED):
        assert f"'{name}'" in told


WITH_MODEL = [name for name in LISTED if PLACED in inspect.signature(COMMANDS[name]).parameters]


@pytest.mark.parametrize("name", WITH_MODEL)
def test_the_model_may_stand_first(name: str) -> None:
    """As in `pore check MODEL` and `pore serve MODEL`: none of these takes other words."""
    if name == "ui":
        pytest.importorskip("uvicorn", reason="needs the extra ui: .ci/serve runs this")
    twice = run(name, "./no-such-model", "-m", "another", code=1)
    assert "named twice, ./no-such-model and with --model" in twice.stderr
    assert "./no-such-model" in run(name, "./no-such-model", code=1).stderr


def test_the_model_that_stands_first_is_saved_and_read(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    run("evaluate", "./no-such-model", "--save-config", file, code=1)
    assert "model: ./no-such-model" in file.read_text()
    assert "./no-such-model" in run("evaluate", "--config", file, code=1).stderr
    assert "./another-one" in run("evaluate", "./another-one", "--config", file, code=1).stderr
