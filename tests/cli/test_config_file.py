"""`--config` and `--save-config`: the options of a command from a file, and into one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from helpers.command_line import run
from pore.cli.options import takes

COMMANDS = ("demo", "calibrate", "generate", "evaluate", "bench", "serve")


def options_of(name: str) -> type[Any]:
    module = "evaluate_options" if name == "evaluate" else name
    found: type[Any] = import_module(f"pore.cli.{module}").Options
    return found


def caught(options: type[Any]) -> Callable[..., Any]:
    """A command of these options that does nothing; returns what it was given."""
    found: list[Any] = []
    app = typer.Typer(add_completion=False)

    @app.command("one")
    @takes(options, config=True)
    def _(given: Any) -> None:
        found.append(given)

    def invoke(*line: object) -> Any:
        found.clear()
        result = CliRunner().invoke(app, [str(part) for part in line])
        assert result.exit_code == 0, (line, result.output, result.exception)
        return found[0]

    return invoke


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


def values(kind: Any, info: Any) -> st.SearchStrategy[Any]:
    """Values of an option, as they stand on the line."""
    if kind is bool:
        return st.booleans()
    inner = [one for one in get_args(kind) if one is not type(None)] or [kind]
    (kind,) = inner if getattr(kind, "__origin__", None) is not list else (kind,)
    if getattr(kind, "__origin__", None) is list:
        return st.lists(values(*get_args(kind), info), min_size=1, max_size=3)
    if kind is int:
        low = -(10**6) if info.min is None else info.min
        return st.integers(low, 10**6 if info.max is None else info.max).map(str)
    if kind is float:
        return st.floats(0, 1).map(str)
    return TEXT.filter(lambda text: text.strip() == text)


@st.composite
def lines(draw: st.DrawFn, options: type[Any]) -> list[str]:
    """A command line with some of the options."""
    hints, line, last = get_type_hints(options, include_extras=True), list[str](), list[str]()
    for field in fields(options):
        kind, info = get_args(hints[field.name])
        argument = type(info).__name__ == "ArgumentInfo"
        needed = argument and field.name in ("files", "question")
        if getattr(info, "exists", False):
            continue  # a file or a folder that must be there
        if not (needed or draw(st.booleans())):
            continue
        value = draw(values(kind, info))
        names = [info.default, *(info.param_decls or ())]
        name = next((one for one in names if str(one).startswith("--")), None)
        name = name or f"--{field.name.replace('_', '-')}"
        if argument:
            last += map(str, value if isinstance(value, list) else [value])
        elif isinstance(value, bool):
            line += [name] if value else []
        else:
            line += [f"{name}={each}" for each in (value if isinstance(value, list) else [value])]
    return [*line, "--", *last]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.at_once(1)
def test_a_saved_run_is_the_same_run(name: str, tmp_path: Path) -> None:
    options = options_of(name)
    one, path = caught(options), tmp_path / "run.yaml"

    @given(lines(options))
    @settings(max_examples=12, suppress_health_check=list(HealthCheck))
    def check(line: list[str]) -> None:
        chosen = one("--save-config", path, *line)
        assert one("--config", path) == chosen
        again = tmp_path / "again.yaml"
        assert one("--config", path, "--save-config", again) == chosen
        assert again.read_text().split("\n", 1)[1] == path.read_text().split("\n", 1)[1]

    check()


def test_the_line_counts_more_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("keep: [25%, 10%]\nmodel: here\nseed: 3\ntiming: false\nall: true\n")
    one = caught(options_of("evaluate"))
    found = one("--config", path)
    assert (found.keep, found.model, found.seed) == (["25%", "10%"], "here", 3)
    assert (found.timing, found.every) == (False, True)
    found = one("--keep", "64", "--config", path, "-m", "there", "--timing")
    assert (found.keep, found.model, found.seed) == (["64"], "there", 3)
    assert found.timing


def test_values_are_read_as_on_the_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("revision: 0123\ndtype: no\nkeep: 25%\nset: [a=1, b=~]\n")
    found = caught(options_of("evaluate"))("--config", path)
    assert (found.revision, found.dtype, found.keep) == ("0123", "no", ["25%"])
    assert found.settings == ["a=1", "b=~"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_new_tokens: 3", "line 1 of FILE names 'max_new_tokens', which is no option of this "),
        ("max_new_tokens: 3", "the nearest is 'max-new-tokens'."),
        ("seed: 1\nkep: 3", "line 2 of FILE names 'kep'"),
        ("config: x", "names 'config', which is no option"),
        ("seed: 1\nseed: 2", "line 2 of FILE names 'seed' for the second time"),
        ("model: [a, b]", "line 1 of FILE gives a list, and 'model' takes one value"),
        ("keep: {a: 1}", "line 1 of FILE must give a value, or a list of values"),
        ("- a", "must have a line for every option"),
        ("a: [", "FILE is not YAML"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    found = run("evaluate", "--config", path, code=1)
    assert message.replace("FILE", str(path)) in found.stderr


def test_a_value_of_the_file_that_is_wrong_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: many")
    found = run("evaluate", "--config", path, code=2)
    assert "--seed" in found.stderr
    assert str(path.name) in "".join(found.stderr.replace("│", "").split())  # it is in a box
    run("evaluate", "--config", tmp_path / "none.yaml", code=1)


def test_nothing_is_written_where_options_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    run("serve", "--unpruned", "--keep", "4", "--save-config", path, code=1)
    assert not path.exists()
