"""Opens data sets of the `datasets` library: from the hub, from parquet, or as they were saved."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from pore.errors import InputError

_PARQUET = ".parquet"

_SAVED = ("dataset_dict.json", "state.json")  # of one with splits, and of one without

_HUB = re.compile(r"(?:hf://datasets/|https?://huggingface\.co/datasets/)([^/]+/[^/?#]+)/?")


def library() -> ModuleType:
    """The `datasets` library; InputError if it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "Reading data sets needs the datasets library: pip install 'pore-vlm[datasets]'."
        ) from error
    found: ModuleType = datasets
    return found


def is_local(path: Path) -> bool:
    """Whether a path that exists is a data set: parquet, or a folder that `save_to_disk` wrote."""
    if not path.is_dir():
        return path.suffix == _PARQUET
    return _is_saved(path) or any(path.rglob(f"*{_PARQUET}"))


def opened(name: str, split: str, stream: bool) -> Any:
    """A data set by name.

    Args:
        name: A parquet file; a folder of parquet files, or that `save_to_disk` wrote; or a hub id,
            its address, or `id:configuration`.
        split: The split; a parquet file by itself is all of one.
        stream: Whether to read rows as they are needed instead of fetching all of them first.

    Returns:
        A `Dataset`, or with `stream` an `IterableDataset` where it is read from parquet or the hub.

    Raises:
        InputError: It cannot be opened.
    """
    datasets = library()
    here = os.path.exists(name)
    try:
        if here and _is_saved(Path(name)):
            found = datasets.load_from_disk(name)
            return found[_known(split, list(found), name)] if isinstance(found, dict) else found
        if here and not os.path.isdir(name):
            files = {"data_files": name, "split": "train"}
            return datasets.load_dataset("parquet", streaming=stream, **files)
        address = _HUB.fullmatch(name)
        hub_id, _, configuration = (address[1] if address else name).partition(":")
        options = {"name": configuration} if configuration and not here else {}
        return datasets.load_dataset(
            name if here else hub_id, split=split, streaming=stream, **options
        )
    except InputError:
        raise
    except Exception as error:  # hub, cache, parsers: each has its own errors
        what = name if here else f"{name} is not a file or folder here, and"
        hint = (
            " If this machine has no network, fetch it elsewhere and bring the folder that its "
            "save_to_disk writes."
            if isinstance(error, ConnectionError)
            else ""
        )
        raise InputError(
            f"{what} cannot be loaded as a data set (split "
            f"{split!r}): {type(error).__name__}: {error}{hint}"
        ) from error


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in _SAVED)


def _known(split: str, splits: list[str], name: str) -> str:
    """The split, which must be one of those there."""
    if split not in splits:
        raise InputError(f"{name} has no split {split!r}; it has {', '.join(splits)}.")
    return split
