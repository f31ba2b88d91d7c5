"""Opens data sets of the `datasets` library: of the hub, of files, or as they were saved."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from pore.errors import InputError

SHARDS = {".parquet": "parquet", ".tar": "webdataset"}
"""What the files of data sets end in, and what `datasets` calls them."""

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
    """Whether a path that exists is a data set: files, or a folder that `save_to_disk` wrote."""
    if not path.is_dir():
        return path.suffix in SHARDS
    return _is_saved(path) or any(any(path.rglob(f"*{ending}")) for ending in SHARDS)


def shards(name: str, split: str) -> list[str] | None:
    """The parquet or WebDataset files of a split; None for what is not read from such files here.

    Args:
        name: As in `opened`; or the address of one file in a store, such as "s3://...".
        split: The split, where the names of files tell which they are of.

    Raises:
        InputError: The folder has no such split, or cannot be looked through.
    """
    if not os.path.exists(name):
        return [name] if "://" in name and Path(name).suffix in SHARDS else None
    if not is_local(Path(name)) or _is_saved(Path(name)):
        return None
    if not os.path.isdir(name):
        return [name]
    try:
        files = library().load_dataset_builder(name).config.data_files
    except Exception as error:
        raise _refusal(name, split, error) from error
    return list(map(str, files[_known(split, list(map(str, files)), name)]))


def opened(name: str, split: str, stream: bool) -> Any:
    """A data set by name.

    Args:
        name: A parquet or WebDataset (.tar) file; a folder of such files, or one that
            `save_to_disk` wrote; or a hub id, its address, or `id:configuration`.
        split: The split; a file by itself is all of one.
        stream: Whether to read rows as they are needed instead of fetching all of them first.

    Returns:
        A `Dataset`, or with `stream` an `IterableDataset` where it is read from files or the hub.

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
            return datasets.load_dataset(SHARDS[Path(name).suffix], streaming=stream, **files)
        address = _HUB.fullmatch(name)
        hub_id, _, configuration = (address[1] if address else name).partition(":")
        options = {"name": configuration} if configuration and not here else {}
        return datasets.load_dataset(
            name if here else hub_id, split=split, streaming=stream, **options
        )
    except InputError:
        raise
    except Exception as error:  # hub, cache, parsers: each has its own errors
        raise _refusal(name, split, error) from error


def _refusal(name: str, split: str, error: Exception) -> InputError:
    """What is said where a data set cannot be opened."""
    what = name if os.path.exists(name) else f"{name} is not a file or folder here, and"
    hint = (
        " If this machine has no network, fetch it elsewhere and bring the folder that its "
        "save_to_disk writes."
        if isinstance(error, ConnectionError)
        else ""
    )
    return InputError(
        f"{what} cannot be loaded as a data set (split "
        f"{split!r}): {type(error).__name__}: {error}{hint}"
    )


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in _SAVED)


def _known(split: str, splits: list[str], name: str) -> str:
    """The split, which must be one of those there."""
    if split not in splits:
        raise InputError(f"{name} has no split {split!r}; it has {', '.join(splits)}.")
    return split
