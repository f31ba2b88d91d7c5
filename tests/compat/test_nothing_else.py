"""No other file of pore touches what is private to another library."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pore

SOURCE = Path(pore.__file__).parent
# Modules of transformers that its documentation shows, beside the top one.
DOCUMENTED = {"transformers.modeling_outputs", "transformers.utils.logging"}


def own_names(trees: dict[Path, ast.Module]) -> set[str]:
    """The underscored names that the package itself defines."""
    found = {"_replace", "_asdict"}  # of named tuples, and documented
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
                found |= {node.attr} if of_self else set()
    return found


def foreign(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Private names of others that a file reads, or undocumented modules that it imports from."""
    parts = {id(p) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for p in n.values}
    for node in ast.walk(tree):
        names = []
        if id(node) in parts:
            continue
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            modules = [alias.name for alias in node.names] if module is None else [module]
            for name in modules:
                if name.startswith("transformers.") and name not in DOCUMENTED:
                    yield f"line {node.lineno}: {name}"
            if module is not None and not module.startswith("pore"):
                names = [*module.split("."), *(alias.name for alias in node.names)]
        for name in names:
            if re.fullmatch(r"_[a-z]\w*", name) and name not in own:
                yield f"line {node.lineno}: {name}"


def test_no_other_file_touches_what_is_private() -> None:
    trees = {path: ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}
    private = [trees.pop(path) for path in SOURCE.joinpath("_compat").glob("*.py")]
    own = own_names(trees)
    found = {
        str(path.relative_to(SOURCE)): list(foreign(tree, own)) for path, tree in trees.items()
    }
    assert {path: lines for path, lines in found.items() if lines} == {}
    named = {line.split(": ")[1] for tree in private for line in foreign(tree, own)}
    assert {"_attn_implementation", "_orig_mod", "_hf_hook", "_deepstack_process"} <= named
