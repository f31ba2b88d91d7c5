"""Answers kept batch by batch: what is damaged does not count, and what is whole does."""

from __future__ import annotations

from pathlib import Path

import pytest

from pore import _files
from pore._files import append
from pore.evaluation.journal import Journal

SETTING = {"model": "m", "method": {"name": "FastV"}}

BATCHES = {0: [{"id": "a"}], 3: [], 1: [{"id": "b"}, {"id": "c"}]}


def written(path: Path) -> None:
    journal = Journal(path, SETTING)
    for number, answers in BATCHES.items():
        journal.add(number, answers)


def test_batches_come_back(tmp_path: Path) -> None:
    path = tmp_path / "x" / "j.batches"
    written(path)
    assert Journal(path, SETTING).batches == BATCHES
    assert Journal(path, {"model": "n"}).batches == {}
    assert not path.exists()  # of another setting
    journal = Journal(None, SETTING)
    journal.add(0, [])
    assert journal.batches == {}


def test_cut_at_any_byte(tmp_path: Path) -> None:
    """The lines before the cut count, and the file goes on from there."""
    path = tmp_path / "j.batches"
    written(path)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (*range(0, len(whole), 7), len(whole) - 1):
        path.write_bytes(whole[:cut])
        kept = max(sum(end <= cut for end in ends) - 1, 0)
        journal = Journal(path, SETTING)
        assert journal.batches == dict(list(BATCHES.items())[:kept])
        journal.add(9, [{"id": "z"}])
        assert Journal(path, SETTING).batches == journal.batches | {9: [{"id": "z"}]}


def test_a_line_that_was_changed_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "j.batches"
    written(path)
    path.write_bytes(path.read_bytes().replace(b'"id": "a"', b'"id": "x"'))
    assert Journal(path, SETTING).batches == {}


def test_lines_are_appended_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "file"
    append(path, "one\n")

    def full(_: int) -> None:
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(_files.os, "fsync", full)
        with pytest.raises(OSError, match="no room"):
            append(path, "two\n")
    append(path, "three \ud800\n")
    assert path.read_text() == "one\nthree \\ud800\n"
