"""What commands check before they load a model, so that nobody waits minutes for a refusal."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pore._files import shown
from pore.errors import InputError, PoreError


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Put the option before an error that does not name it."""
    try:
        yield
    except PoreError as error:
        if option in str(error):
            raise
        raise type(error)(f"{option}: {error}") from error


def check_folder(path: Path | None, option: str) -> None:
    """Refuse a folder into which nothing can be written; it need not be there yet."""
    if path is None:
        return
    for parent in (path.absolute(), *path.absolute().parents):
        if os.path.lexists(parent):
            break
    if not os.path.isdir(parent):
        raise InputError(
            f"{option} {shown(path)}: {shown(parent)} is a file, so there can be no folder here; "
            "choose another place."
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(
            f"{option} {shown(path)}: you may not write into {shown(parent)}; choose another place."
        )


def check_file(path: Path | None, option: str) -> None:
    """Refuse a file that cannot be written."""
    if path is None:
        return
    if os.path.isdir(path):
        raise InputError(f"{option} {shown(path)} is a folder; name a file.")
    check_folder(path.absolute().parent, option)


def check_drawing(option: str) -> None:
    """Refuse to draw without matplotlib."""
    if find_spec("matplotlib") is None:
        raise InputError(
            f"{option} draws figures, for which matplotlib is needed; install it with: "
            "pip install 'pore-vlm[plot]'"
        )


def check_method(name: str, settings: Sequence[str] | None) -> None:
    """Refuse a method that there is not, and settings that it does not have."""
    from pore.methods.registry import method_named
    from pore.methods.settings import read_settings

    with naming("--method"):
        kind = method_named(name)
    with naming("--set"):
        read_settings(kind, settings or ())


def check_reweight(name: str | None) -> None:
    """Refuse a P that cannot be read."""
    from pore.evaluation.reweighting import ROPE, UNCALIBRATED, load_bias

    if name is not None and name not in (ROPE, *UNCALIBRATED):
        with naming("--reweight"):
            load_bias(name)


def check_samples(source: str | None, option: str, **how: Any) -> None:
    """Refuse samples that are not there, or not as the options say; the hub is not asked.

    Args:
        source: What `load_samples` takes; None for the embedded scenes.
        option: The option that names them.
        **how: Further arguments of `load_samples`.
    """
    from pore.data.sources import load_samples

    if source is None and how.get("questions") is None:
        return
    source = "embedded:test" if source is None else source
    here = source.startswith(("embedded:", ".", "/", "~")) or source.endswith((".jsonl", ".ndjson"))
    if here or os.path.exists(source):
        with naming(option):
            load_samples(source, limit=1, stream=True, **how)
