"""Files are written whole or not at all, and only files that have an end are read."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

_locks: Any = None
with suppress(ImportError):  # on Windows, where temporary files of killed writers stay
    import fcntl

    _locks = fcntl


_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.pore")

_CLOSED_BY_EXEC = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> Path:
    """Write `data` to `path` so that a reader sees the old file or the whole new one.

    A file that is there keeps its permissions, and a link to it stays a link. A new file has the
    permissions of any new file.

    Args:
        path: Where to write; missing parent folders are made.
        data: Text or bytes. Text is written as UTF-8. Halves of surrogate pairs, as Python has
            them for file names that are not UTF-8, are written as escapes.

    Returns:
        The path written.

    Raises:
        OSError: The folder cannot be made or written to, or `path` is a folder, a pipe or a device.
            An existing file is then unchanged.
    """
    payload = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    target = _resolved(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        mode = stat.S_IMODE(_regular(os.stat(target), path).st_mode)
    except FileNotFoundError:
        mode = None
    _remove_stale(target.parent)
    # Never more readable than the file it replaces; the kernel applies the umask.
    descriptor, name = _temporary(target.parent, 0o666 if mode is None else mode & 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(payload)
            file.flush()
            if mode is not None:
                os.chmod(name, mode)
            os.fsync(file.fileno())
            if _locks is None:  # Windows renames no open file; elsewhere it is locked up to its end
                file.close()
            os.replace(name, target)
    except BaseException:
        name.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every system opens folders
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return Path(path)


def append(path: str | os.PathLike[str], text: str) -> None:
    """Append lines to a file, all of them or none; they are on the disk when this returns.

    Args:
        path: The file; it and missing parent folders are made.
        text: Whole lines, written as UTF-8 as by `write_atomic`.

    Raises:
        OSError: It cannot be written; it is then as it was.
    """
    target = _resolved(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "ab", buffering=0) as file:
        before = file.tell()
        try:
            data = text.encode("utf-8", "backslashreplace")
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, "there is no room for all of it", shown(path))
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file to read its bytes.

    Pipes, sockets and devices are refused: reading them may never end.

    Args:
        path: The file, or a link to it.

    Returns:
        The open file.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    try:
        # Before it is opened, because opening some devices has effects; and again afterwards,
        # because the name may mean another file by then.
        _regular(os.stat(path), path)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _CLOSED_BY_EXEC
        descriptor = os.open(path, flags)
    except ValueError as error:
        raise _no_name(path) from error
    try:
        _regular(os.fstat(descriptor), path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of a file.

    Args:
        path: The file, or a link to it.
        most: The largest number of bytes.

    Returns:
        The bytes.

    Raises:
        OSError: It cannot be read, is not a regular file, or is larger than `most`.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > most or len(data := file.read(most + 1)) > most:
            why = f"it is larger than any that pore reads ({most >> 20} MiB)"
            raise OSError(errno.EFBIG, why, shown(path))
    return data


def shown(path: str | os.PathLike[str]) -> str:
    """A path as text that can be printed and written, whatever bytes its name has."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode()


def _regular(found: os.stat_result, path: str | os.PathLike[str]) -> os.stat_result:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", shown(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, not a file", shown(path))
    return found


def _resolved(path: str | os.PathLike[str]) -> Path:
    """The file that a path leads to, through any links; it need not be there."""
    try:
        target = Path(os.path.realpath(path))
    except ValueError as error:
        raise _no_name(path) from error
    if target.is_symlink():
        raise OSError(errno.ELOOP, "its links lead in a circle", shown(path))
    return target


def _no_name(path: str | os.PathLike[str]) -> OSError:
    return OSError(errno.EINVAL, "no file can have such a name", repr(os.fspath(path)))


def _temporary(folder: Path, mode: int) -> tuple[int, Path]:
    """A new file in a folder, open for writing, and locked as long as it is open."""
    while True:
        name = folder / f".{secrets.token_hex(8)}.pore"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CLOSED_BY_EXEC
        descriptor = os.open(name, flags, mode)
        if _locks is not None:
            with suppress(OSError):  # not every file system has locks
                _locks.flock(descriptor, _locks.LOCK_EX)
        # Another process may have seen it before it was locked, and removed it as abandoned.
        if os.fstat(descriptor).st_nlink:
            return descriptor, name
        os.close(descriptor)


def _remove_stale(folder: Path) -> None:
    """Remove the temporary files of killed processes: those that no process has locked."""
    if _locks is None:
        return
    with suppress(OSError):
        for entry in os.scandir(folder):
            if _TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(OSError), open_regular(entry.path) as file:
                    _locks.flock(file, _locks.LOCK_SH | _locks.LOCK_NB)
                    os.unlink(entry.path)
