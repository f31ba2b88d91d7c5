"""What defines a task of lmms-eval on this machine: its YAML files, its Python, and its data."""

from __future__ import annotations

import ast
import glob
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pore.evaluation.harness.evaluator import load_yaml_config

# Names under which data sets are read from files; a folder of such a name is not meant.
_BUILDERS = {"arrow", "audiofolder", "csv", "imagefolder", "json", "pandas", "parquet", "text"}

# What is larger goes by sizes and times: a file, and all files of a folder together.
_LARGEST_FILE, _LARGEST_FOLDER = 1 << 30, 64 << 20


def definition(path: str | os.PathLike[str]) -> str:
    """A digest of all that defines a task on this machine.

    That is its YAML file and those that it includes, the Python files of its functions and the
    files beside them or among lmms-eval's tasks that these import, and the local files and folders
    that it has data from. What the hub holds is not looked at.

    Args:
        path: The task's YAML file.

    Returns:
        The digest; the same wherever the files lie.
    """
    files = _files(Path(path))
    told = [[each.name, _content(each)] for each in files]
    config = load_yaml_config(str(path), mode="simple")
    told += [[each.name, _data(each)] for each in _local_data(config)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    """The YAML files, each after those that include it, and then the Python files."""
    read: dict[Path, None] = {}
    modules: dict[Path, None] = {}

    def follow(file: Path) -> None:
        if file in read:
            return
        read[file] = None
        top = yaml.compose(file.read_bytes(), Loader=yaml.BaseLoader)
        for node in _scalars(top):
            if node.tag == "!function":
                module = _module(node.value.rpartition(".")[0], file.parent)
                _follow_imports(module, modules)
        for name in _included(top):
            follow(Path(name) if os.path.isfile(name) else file.parent / name)

    follow(path)
    return [*read, *modules]


def _scalars(node: Any) -> Iterator[Any]:
    """All single values of a YAML document."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.SequenceNode):
        for one in node.value:
            yield from _scalars(one)
    elif isinstance(node, yaml.MappingNode):
        for _, one in node.value:
            yield from _scalars(one)


def _included(top: Any) -> Iterator[str]:
    """The files that a YAML document includes, as it names them."""
    for key, value in top.value if isinstance(top, yaml.MappingNode) else ():
        if key.value == "include":
            yield from (node.value for node in _scalars(value))


def _module(name: str, folder: Path) -> Path | None:
    """The file of a module, as lmms-eval finds it: beside the YAML file, or else installed."""
    beside = folder / f"{name}.py"
    if beside.is_file():
        return beside
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # lmms-eval will say so
        return None
    origin = None if found is None else found.origin
    return Path(origin) if origin is not None and os.path.isfile(origin) else None


def _follow_imports(file: Path | None, found: dict[Path, None]) -> None:
    """Note a Python file, and what it imports from beside it or from lmms-eval's tasks."""
    if file is None or file in found:
        return
    found[file] = None
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # lmms-eval will say so
        return
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            names += [start, *(f"{start}.{one.name}".strip(".") for one in node.names)]
    for name in filter(None, names):
        beside = file.parent.joinpath(*name.split(".")).with_suffix(".py")
        if beside.is_file():
            _follow_imports(beside, found)
        elif name.startswith("lmms_eval.tasks."):
            _follow_imports(_module(name, file.parent), found)


def _local_data(config: dict[str, Any]) -> list[Path]:
    """The files and folders on this machine that a task has data from."""
    kwargs = config.get("dataset_kwargs") or {}
    source, folder = config.get("dataset_path"), kwargs.get("data_dir")
    starts = [
        Path(one)
        for one in (source, folder)
        if isinstance(one, str) and one not in _BUILDERS and os.path.exists(one)
    ]
    found = dict.fromkeys(starts)
    bases = [Path(), *(start for start in starts if start.is_dir())]
    for name in _texts(kwargs.get("data_files")):
        for base in bases:
            found |= dict.fromkeys(map(Path, sorted(glob.glob(str(base / name), recursive=True))))
            if (base / name).exists():  # whose name may hold what glob reads as a pattern
                found[base / name] = None
    return list(found)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _texts(one)


def _data(path: Path) -> Any:
    """A file or a folder of data as JSON that changes when the data does."""
    if path.is_file():
        return _content(path)
    files = sorted(each for each in path.rglob("*") if each.is_file())
    whole = sum(each.stat().st_size for each in files) <= _LARGEST_FOLDER
    return [
        [str(each.relative_to(path)), _content(each) if whole else _size(each)] for each in files
    ]


def _content(path: Path) -> Any:
    """A digest of what a file holds; of a very large one its size and when it was written."""
    if path.stat().st_size > _LARGEST_FILE:
        return _size(path)
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def _size(path: Path) -> list[int]:
    told = path.stat()
    return [told.st_size, told.st_mtime_ns]
