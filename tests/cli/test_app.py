"""Help, errors and exit codes of the command line."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

import pore
from helpers.command_line import run
from pore.cli.app import COMMANDS, app
from pore.cli.printing import in_options
from pore.cli.verbosity import CHOSEN


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str) -> None:
    text = run(command, "--help").output
    if command not in ("methods", "models"):
        assert f"pore {command}" in text.split("Examples", 1)[1]


def test_help_lists_every_command() -> None:
    text = run("--help").output
    assert all(command in text for command in COMMANDS)


def test_version() -> None:
    assert run("--version").output.strip() == f"pore {pore.__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("flops", "--shape", "nonsense"), "'nonsense' is not a shape"),
        (("flops", "--layer", "99"), "layer"),
        (("plot", "missing.json"), "Error: missing.json: no such file or directory."),
        (("compare", "missing.json", "missing.json"), "missing.json: no such file or directory."),
        (("generate", "missing.png", "q"), "missing.png"),
        (("calibrate", "-m", "MODEL", "-s", "./missing"), "There is no file or folder ./missing"),
        (("calibrate", "-m", "MODEL", "--layer", "9", "--limit", "1"), "choose 1 to 4"),
        (("evaluate", "-m", "MODEL", "--method", "magic", "--limit", "1"), "no method 'magic'"),
        (
            ("evaluate", "-m", "MODEL", "--keep", "0", "--limit", "1"),
            "--keep 0 keeps no visual token",
        ),
        (("evaluate", "-m", "MODEL", "--keep", "17", "--limit", "1"), "asks for more visual"),
        (("evaluate", "-m", "MODEL", "--keep", "0.0", "--limit", "1"), "--keep 0.0 keeps no"),
        (("evaluate", "-m", "./no-model"), "no-model"),
        (("evaluate", "-m", "MODEL", "--device", "abacus"), "There is no device 'abacus'"),
        (("evaluate", "-m", "MODEL", "--dtype", "int3"), "'int3' is not a number format"),
        (("evaluate", "-m", "MODEL", "--attn", "none"), "cannot load"),
        (
            ("evaluate", "-m", "MODEL", "--method", "random", "--reweight", "rope", "--limit", "1"),
            "does not rank by text-visual attention",
        ),
    ],
)
def test_errors_are_messages(model: Path, arguments: tuple[str, ...], message: str) -> None:
    given = [str(model) if argument == "MODEL" else argument for argument in arguments]
    found = run(*given, code=1)
    assert message in found.stderr
    assert "Traceback" not in found.output
    assert len(found.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("place", [0, 1, 3])
def test_debug_gives_the_error_itself(place: int) -> None:
    line = ["flops", "--shape", "nonsense"]
    line.insert(place, "--debug")
    found = CliRunner().invoke(app, line)
    assert isinstance(found.exception, pore.PoreError)
    assert run("flops", "--shape", "nonsense", code=1).stderr  # the next line asks for it anew


def test_an_error_that_nobody_expected_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise KeyError("a\nb")

    monkeypatch.setattr("pore.cost.named.model_shape", fails)
    found = run("flops", code=1)
    assert len(found.stderr.strip().splitlines()) == 1
    assert found.stderr.startswith("Error: KeyError: ")
    assert "Run the same command with --debug" in found.stderr
    found = CliRunner().invoke(app, ["flops", "--debug"])
    assert isinstance(found.exception, KeyError)


def test_verbose_and_quiet_stand_anywhere() -> None:
    before = transformers.utils.logging.get_verbosity()
    try:
        for line in (("-v", "benchmarks"), ("benchmarks", "--verbose")):
            run(*line)
            assert CHOSEN.verbose
            assert transformers.utils.logging.get_verbosity() == logging.INFO
        run("benchmarks")
        assert not CHOSEN.verbose
        assert transformers.utils.logging.get_verbosity() == logging.ERROR
        for line in (("-q", "benchmarks"), ("benchmarks", "--quiet")):
            run(*line)
            assert CHOSEN.quiet
        run("-q", "benchmarks", "-v", code=2)
    finally:
        transformers.utils.logging.set_verbosity(before)
        logging.getLogger("pore").setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("flops", "--no-such-option"),
        ("generate",),
        ("bench",),
        ("bench", "--shape", "llava-64x2", "-m", "embedded"),
        ("flops", "--keep", "many"),
        ("flops", "--keep", "x%"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    run(*arguments, code=2)


def test_interruption_exits_with_130(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt("half of it is done")

    monkeypatch.setattr("pore.calibration.calibrating.calibrate", interrupted)
    found = run("calibrate", "-m", model, "--limit", "1", code=130)
    assert "Interrupted. half of it is done" in found.stderr


def test_text_only_and_unknown_models_are_refused_before_loading(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    found = run("evaluate", "-m", tmp_path, code=1)
    assert re.search(r"'llama' model, which pore does not know.*llava", found.stderr)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    found = run("evaluate", "-m", tmp_path, code=1)
    assert "cannot be read" in found.stderr


def test_errors_about_calls_name_the_options() -> None:
    options = {"keep": "--keep", "kind": "--kind", "max_bad": "--max-bad", "layer": "--layer"}
    for said, expected in (
        ("keep=17 asks for more.", "--keep 17 asks for more."),
        ('fit kind="spline", or kind="auto".', "fit --kind spline, or --kind auto."),
        ("more than max_bad=0.01; raise max_bad.", "more than --max-bad 0.01; raise --max-bad."),
        ("FastV(keep=6, layer=2) keeps layer=3.", "FastV(keep=6, layer=2) keeps --layer 3."),
        ("upkeep=3, keep this kind", "upkeep=3, keep this kind"),
    ):
        assert in_options(said, options) == expected
        assert in_options(said, {}) == said
