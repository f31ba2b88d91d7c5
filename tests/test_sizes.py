"""Files, functions and lists of parameters can be held in the head, and the repository is small."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for folder in ("src", "tests", "training", "docs", "examples")
    for path in (ROOT / folder).rglob("*.py")
)
LINES, CODE_LINES, PARAMETERS = 400, 60, 12
BINARY = {".safetensors", ".png", ".gif"}

_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def code_lines(text: str, module: ast.Module) -> set[int]:
    """The lines of a module that hold code: neither blank, nor comment, nor docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(module):
        if isinstance(node, (ast.Module, ast.ClassDef, Function)) and ast.get_docstring(node):
            lines.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def parameters(function: Function) -> int:
    """How many parameters a function takes, without `self` or `cls`."""
    given = function.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    names += [one.arg for one in (given.vararg, given.kwarg) if one is not None]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def too_long(text: str) -> Iterator[str]:
    """What of a module is longer than allowed."""
    lines = len(text.splitlines())
    if lines > LINES:
        yield f"{lines} lines, more than {LINES}"
    module = ast.parse(text)
    functions = [node for node in ast.walk(module) if isinstance(node, Function)]
    spans = [range(node.lineno, (node.end_lineno or 0) + 1) for node in functions]
    # Which lines hold code is looked at where it can matter, as that takes long.
    code = code_lines(text, module) if max(map(len, spans), default=0) > CODE_LINES else set()
    for node, span in zip(functions, spans, strict=True):
        own = len(code & set(span))
        if own > CODE_LINES:
            yield f"{node.name}: {own} lines of code, more than {CODE_LINES}"
        if parameters(node) > PARAMETERS:
            yield f"{node.name}: {parameters(node)} parameters, more than {PARAMETERS}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_sizes(path: Path) -> None:
    assert list(too_long(path.read_text(encoding="utf-8"))) == []


def test_what_is_too_long_is_found() -> None:
    body = "\n".join(f"    x{i} = {i}  # why" for i in range(CODE_LINES + 1))
    names = ", ".join(f"p{i}" for i in range(PARAMETERS + 1))
    documented = '    """Says\n\n    much."""\n    # And this.\n\n'
    assert list(too_long(f"def f({names}):\n{documented}{body}\n")) == [
        f"f: {CODE_LINES + 2} lines of code, more than {CODE_LINES}",
        f"f: {PARAMETERS + 1} parameters, more than {PARAMETERS}",
    ]
    assert list(too_long("x = 1\n" * (LINES + 1))) == [f"{LINES + 1} lines, more than {LINES}"]
    assert list(too_long(f"def f(self, {names[4:]}):\n{documented}    return 1\n")) == []


@pytest.fixture(scope="module")
def shipped() -> list[Path]:
    """The files of the repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in files if path.is_file()]


def test_the_repository_holds_no_stray_files(shipped: list[Path]) -> None:
    """No packages, pictures or archives that a command left in the folder, and little in all."""
    binary = [path for path in shipped if path.suffix in BINARY]
    assert sum(path.stat().st_size for path in binary) < 60_000_000
    assert [path.name for path in binary if path.parent == ROOT] == []
    others = [path for path in shipped if path not in binary]
    assert [path.name for path in others if b"\0" in path.read_bytes()] == []


def test_no_file_names_a_folder_of_the_machine_it_was_made_on(shipped: list[Path]) -> None:
    folder = re.compile(rb"""(?<![\w.])/(?:work|root|tmp|Users|home/(?!pore\b))/?\w""")
    texts = [path for path in shipped if path.suffix not in BINARY]
    assert [path.name for path in texts if folder.search(path.read_bytes())] == []
