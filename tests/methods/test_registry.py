"""Methods are found, not listed; a name is given once; type checkers know each class."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import pore
from pore.errors import InputError, PoreError
from pore.methods import registry
from pore.methods.registry import built_in, method_named, methods


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests know nothing of the methods that are defined here."""
    monkeypatch.setattr(pore.Pruner, "registry", dict(pore.Pruner.registry))


def defined(name: str, module: str = "elsewhere", base: type[pore.Pruner] = pore.Random) -> Any:
    return type("Mine", (base,), {"name": name, "__module__": module})


def test_every_class_with_a_name_is_found() -> None:
    folder = Path(inspect.getfile(pore.FastV)).parent
    defined_there = {
        kind.name
        for file in folder.glob("*.py")
        for kind in ast.parse(file.read_text()).body
        if isinstance(kind, ast.ClassDef)
        and any(ast.unparse(line).startswith("name: ClassVar[str] = ") for line in kind.body)
    }
    assert defined_there == set(built_in())
    for name, kind in built_in().items():
        assert getattr(pore, name) is kind
        assert methods()[kind.name] is kind


@pytest.mark.slow
def test_the_folder_of_methods_can_be_called() -> None:
    """`pore.methods` is the function, and once a method was imported by its path the folder."""
    code = (
        "import pore; before = pore.methods(); import pore.methods.fastv; "
        "assert before == pore.methods(); assert before['FastV'] is pore.methods.fastv.FastV"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_checkers_are_told_of_every_name() -> None:
    """`pore.NewMethod` is found when it runs; for mypy and editors it has a line of its own."""
    (told,) = (
        node.body
        for node in ast.parse(inspect.getsource(pore)).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "_typing.TYPE_CHECKING"
    )
    homes = {name: kind.__module__ for name, kind in built_in().items()}
    for name, home in pore._HOME.items():
        homes[name] = home.removesuffix(f".{name}")  # of a module, the folder
    lines = sorted(f"from {home} import {name} as {name}" for name, home in homes.items())
    assert sorted(map(ast.unparse, told)) == lines, "pore/__init__.py: put these lines there:\n" + (
        "\n".join(f"    {line}" for line in lines)
    )


@pytest.mark.slow
def test_mypy_knows_the_settings_of_a_method(tmp_path: Path) -> None:
    file = tmp_path / "user.py"
    file.write_text(
        "import pore\nreveal_type(pore.FastV)\npore.FastV(keep=3, layr=2)\npore.FastW(keep=3)\n"
    )
    source = Path(inspect.getfile(pore)).parents[1]
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent"]
    command += ["--cache-dir", str(tmp_path / "cache")]
    found = subprocess.run(
        [*command, str(file)],
        capture_output=True,
        text=True,
        cwd=source,
    )
    assert "keep: int | float" in found.stdout or "keep: builtins" in found.stdout, found.stdout
    assert 'Unexpected keyword argument "layr"' in found.stdout
    assert 'Module has no attribute "FastW"' in found.stdout


class TestNames:
    def test_a_name_that_is_taken_is_refused(self) -> None:
        with pytest.raises(PoreError, match=r"named 'FastV' exists already, pore\.methods\.fastv"):
            defined("FastV")
        assert methods()["FastV"] is pore.FastV

    def test_names_are_told_apart_in_any_case(self) -> None:
        with pytest.raises(PoreError, match=r"give elsewhere\.Mine another name"):
            defined("fastv")

    def test_a_class_may_be_defined_anew(self) -> None:
        first, second = defined("Mine"), defined("Mine")
        assert methods()["Mine"] is second is not first

    def test_a_dataclass_with_slots_is_one_method(self) -> None:
        @dataclass(frozen=True, slots=True)
        class Slotted(pore.Pruner):
            keep: int

            name: ClassVar[str] = "Slotted"
            paper: ClassVar[str] = "none"

            def stages(self) -> list[Any]:
                return []

        assert methods()["Slotted"] is Slotted

    def test_a_subclass_without_a_name_is_no_method(self) -> None:
        before = methods()
        type("Spy", (pore.FastV,), {})
        assert methods() == before

    def test_one_is_named_in_any_case(self) -> None:
        assert method_named("vtc-cls") is pore.VTCCLS
        for name, kind in methods().items():
            assert method_named(name.upper()) is method_named(kind.__name__) is kind
        with pytest.raises(InputError, match=r"'fast'\. Did you mean 'FastV'\? There are"):
            method_named("fast")


class TestOtherPackages:
    def install(self, monkeypatch: pytest.MonkeyPatch, given: Any) -> None:
        entry = metadata.EntryPoint("mine", "somewhere:Mine", "pore.methods")
        monkeypatch.setattr(metadata.EntryPoint, "load", lambda _: given())
        monkeypatch.setattr(metadata, "entry_points", lambda group: [entry])
        registry._load_entry_points.cache_clear()

    @pytest.fixture(autouse=True)
    def forgotten(self) -> Any:
        yield
        registry._load_entry_points.cache_clear()

    def test_are_found_by_name_and_by_class(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.install(monkeypatch, lambda: defined("mine"))
        found: Any = pore
        assert methods()["mine"] is found.Mine
        with pytest.raises(AttributeError, match="no attribute 'Theirs'"):
            _ = found.Theirs

    def test_are_not_loaded_for_other_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> None:
            raise AssertionError

        self.install(monkeypatch, fail)
        assert not hasattr(pore, "nothing")

    def test_what_is_no_method_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.install(monkeypatch, lambda: torch.nn.Linear)
        with pytest.raises(PoreError, match=r"not a subclass of pore\.Pruner"):
            methods()
