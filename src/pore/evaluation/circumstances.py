"""The circumstances of an evaluation, kept in the files of its results."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from pore import bench


def circumstances(device: torch.device, seed: int, command: str) -> dict[str, Any]:
    """How results came about, so that somebody else can get them again.

    Args:
        device: The device of the model.
        seed: Seed of methods that draw at random, and of the bootstrap of differences.
        command: The command line.

    Returns:
        `command`, `date`, `seed`, `versions` of Python and the packages, `commit` of the library's
        source, and `hardware`, as plain JSON types.
    """
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "seed": seed,
        **surroundings(device),
    }


def surroundings(device: torch.device, *, apart_from: Collection[str] = ()) -> dict[str, Any]:
    """By what and on what machine answers are given.

    Args:
        device: The device of the model.
        apart_from: Packages that take no part, though they are imported.

    Returns:
        `versions`, `commit` and `hardware`, as in `circumstances`.
    """
    hardware = bench.hardware(device)
    del hardware["peak_memory"]  # nothing here is measured in memory
    versions = {k: v for k, v in bench.versions().items() if k not in apart_from}
    return {"versions": versions, "commit": commit(), "hardware": hardware}


def commit(file: Path = Path(__file__)) -> str | None:
    """The commit of a git checkout that a source file belongs to.

    Args:
        file: The file.

    Returns:
        The commit, with "+changes" where tracked files of the folder differ from it; None for a
        file that git does not track, as in an installed package, or where there is no git.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
