"""What starting the command line costs: the modules imported. And what the shell completes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pore.cli import completing
from pore.cli.app import COMMANDS
from pore.methods.registry import built_in

HEAVY = {
    *("torch", "transformers", "matplotlib", "scipy", "numpy", "PIL", "huggingface_hub"),
    *("datasets", "yaml", "safetensors"),
}


def imported(*arguments: str, environment: dict[str, str] | None = None) -> set[str]:
    """The modules that a command line has imported when it ends."""
    code = (
        "import atexit, sys; from pore.cli.app import main; sys.argv = ['pore', *sys.argv[1:]]; "
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr)); main()"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout
    return set(found.stderr.split())


def test_the_version_needs_neither_a_command_nor_rich() -> None:
    modules = imported("--version")
    assert not modules & (HEAVY | {"rich.console"})
    assert not {f"pore.cli.{name}" for name in COMMANDS} & modules


def test_the_list_of_commands_needs_no_command() -> None:
    modules = imported("--help")
    assert not modules & HEAVY
    assert not {f"pore.cli.{name}" for name in COMMANDS} & modules


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_needs_this_command_alone(name: str) -> None:
    modules = imported(name, "--help")
    assert not modules & HEAVY
    assert f"pore.cli.{name}" in modules


def completed(*words: str) -> list[str]:
    """What bash is offered for the last word."""
    line = " ".join(["pore", *words])
    environment = {
        "_PORE_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words)),
    }
    found = subprocess.run(
        [sys.executable, "-m", "pore"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    return found.stdout.split()


def test_commands_options_and_names_are_completed() -> None:
    assert completed("ca") == ["calibrate"]
    assert completed("generate", "--max") == ["--max-new-tokens"]
    assert completed("generate", "--method", "Fast") == ["FastV", "FastVID", "FasterVLM"]
    assert completed("generate", "--method", "fitp") == ["fitprune"]
    assert completed("evaluate", "-m", "emb") == ["embedded", "embedded-video"]


def test_completion_knows_every_method() -> None:
    assert completing.methods("") == sorted(kind.name for kind in built_in().values())
