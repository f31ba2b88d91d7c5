"""Files are whole or as they were, with the modes and links that they had; reading ends."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pore import _files
from pore._files import open_regular, read_regular, shown, write_atomic


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> Any:
    """Sets the umask, and sets it back."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@given(before=st.one_of(st.none(), st.binary()), data=st.one_of(st.binary(), st.text()))
@settings(deadline=None)
def test_what_is_written_is_read(tmp_path_factory: Any, before: bytes | None, data: Any) -> None:
    path = tmp_path_factory.mktemp("folder") / "more" / "file"
    if before is not None:
        write_atomic(path, before)
    assert write_atomic(path, data) == path
    assert path.read_bytes() == (data if isinstance(data, bytes) else data.encode())
    assert os.listdir(path.parent) == ["file"]


def test_text_that_utf8_cannot_hold_is_escaped(tmp_path: Path) -> None:
    text = os.fsdecode(b"caf\xe9.jpg") + " \ud800"
    assert write_atomic(tmp_path / "f", text).read_text() == "caf\\udce9.jpg \\ud800"
    assert shown(text) == "caf\\udce9.jpg \\ud800"


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077])
def test_a_new_file_is_as_any_other(tmp_path: Path, umask: Any, mask: int) -> None:
    umask(mask)
    (tmp_path / "other").touch()
    assert mode_of(write_atomic(tmp_path / "f", "x")) == mode_of(tmp_path / "other")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o666, 0o755, 0o444, 0o4755])
def test_a_file_keeps_its_mode(tmp_path: Path, umask: Any, mode: int) -> None:
    umask(0o077)
    path = tmp_path / "f"
    path.write_text("old")
    path.chmod(mode)
    seen: list[int] = []
    replace = os.replace

    def watched(name: Path, target: Path) -> None:
        seen.append(mode_of(name))
        replace(name, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", watched)
        write_atomic(path, "new")
    assert (path.read_text(), mode_of(path)) == ("new", mode)
    assert seen == [mode]


def test_the_umask_of_other_threads_is_left_alone(tmp_path: Path, umask: Any) -> None:
    umask(0o077)
    stop = threading.Event()
    modes: set[int] = set()

    def make(number: int) -> None:
        path = tmp_path / f"other{number}"
        while not stop.is_set():
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o666))
            modes.add(mode_of(path))
            path.unlink()

    threads = [threading.Thread(target=make, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "umask", lambda _: pytest.fail("the umask is the whole process's"))
        for _ in range(200):
            write_atomic(tmp_path / "f", "x")
    stop.set()
    for thread in threads:
        thread.join()
    assert modes == {0o600}


def test_links_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "file").write_text("old")
    (folder / "file").chmod(0o600)
    (tmp_path / "one").symlink_to(folder / "file")
    (tmp_path / "two").symlink_to("one")
    (tmp_path / "new").symlink_to("there/not yet")
    for name in ("two", "new"):
        write_atomic(tmp_path / name, name)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_text() == name
    assert mode_of(folder / "file") == 0o600
    assert sorted(os.listdir(folder)) == ["file", "not yet"]
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(OSError, match="in a circle"):
        write_atomic(tmp_path / "round", "x")
    assert (tmp_path / "round").is_symlink()


@pytest.mark.parametrize("length", [200, 244, 245, 255])
def test_long_names(tmp_path: Path, length: int) -> None:
    path = tmp_path / ("n" * length)
    for text in ("one", "two"):
        assert write_atomic(path, text).read_text() == text


def test_names_that_no_file_has(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File name too long"):
        write_atomic(tmp_path / ("n" * 256), "x")
    with pytest.raises(OSError, match="no file can have such a name"):
        write_atomic(f"{tmp_path}/a\0b", "x")
    assert os.listdir(tmp_path) == []


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    for name, why in (("pipe", "pipe"), ("link", "pipe"), ("folder", "folder")):
        with pytest.raises(OSError, match=f"it is a {why}"):
            write_atomic(tmp_path / name, "x")
        with pytest.raises(OSError, match=f"it is a {why}"):
            open_regular(tmp_path / name)
    with pytest.raises(OSError, match="a device"):
        write_atomic("/dev/null", "x")
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "pipe"]


@pytest.mark.parametrize("part", ["fsync", "replace", "chmod"])
def test_a_failure_leaves_things_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_atomic(tmp_path / "f", "old")
    monkeypatch.setattr(os, part, full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


_KILLED = """
import os, signal, sys
from pore._files import write_atomic
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_atomic(sys.argv[1], "half")
"""


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "f", "old")
    (tmp_path / ".mine.pore").touch()
    dead = subprocess.run([sys.executable, "-c", _KILLED, str(path)], check=False)
    assert dead.returncode < 0
    assert path.read_text() == "old"
    assert len(os.listdir(tmp_path)) == 3
    write_atomic(path, "new")
    assert path.read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == [".mine.pore", "f"]


def test_a_living_writer_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, inner = os.replace, []

    def meanwhile(name: Path, target: Path) -> None:
        if not inner:  # another file is written while this one is about to be done
            inner.append(name)
            write_atomic(tmp_path / "other", "other")
        replace(name, target)

    monkeypatch.setattr(os, "replace", meanwhile)
    write_atomic(tmp_path / "f", "x")
    assert sorted(os.listdir(tmp_path)) == ["f", "other"]


def test_a_file_taken_for_stale_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    flock, removed = fcntl.flock, []

    def late(file: Any, how: int) -> None:
        if how == fcntl.LOCK_EX and not removed:
            removed.append(1)
            _files._remove_stale(tmp_path)  # between the making and the locking
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write_atomic(tmp_path / "f", "x")
    assert removed
    assert (tmp_path / "f").read_text() == "x"
    assert os.listdir(tmp_path) == ["f"]


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    texts = [str(number) * 10_000 for number in range(8)]
    threads = [
        threading.Thread(target=lambda t=t: [write_atomic(tmp_path / "f", t) for _ in range(20)])  # type: ignore[misc]
        for t in texts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "f").read_text() in texts
    assert os.listdir(tmp_path) == ["f"]


def test_reading_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 10)
    assert read_regular(path, 10) == b"x" * 10
    with pytest.raises(OSError, match="larger than any"):
        read_regular(path, 9)
    with pytest.raises(OSError, match="a device"):  # says that its size is 0
        read_regular("/dev/zero", 9)
    with pytest.raises(OSError, match="larger than any"):  # of size 0 too, but a file
        read_regular("/proc/self/smaps", 9)
