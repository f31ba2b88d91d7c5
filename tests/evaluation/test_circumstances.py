"""What files of results say of how they came about."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from pore.evaluation.circumstances import circumstances, commit


def test_everything_that_is_needed_to_get_results_again() -> None:
    made = circumstances(torch.device("cpu"), 7, "pore evaluate")
    assert (made["seed"], made["command"]) == (7, "pore evaluate")
    versions = made["versions"]
    assert versions["torch"] == torch.__version__
    assert versions["transformers"] == transformers.__version__
    assert {"python", "pore-vlm"} <= versions.keys()
    assert {"device", "cpu", "cpu_cores", "system"} <= made["hardware"].keys()


def test_the_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "a.py"
    file.write_text("1")
    assert commit(file) is None  # no checkout

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert commit(file) is None  # installed into a folder of another project
    git("add", "a.py")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert commit(file) == head
    file.write_text("2")
    assert commit(file) == f"{head}+changes"
