"""The answers of a setting that is not done, kept batch by batch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pore._files import append, read_regular, write_atomic
from pore._saved.parsing import parse_json
from pore._saved.seals import seal, unseal

_LARGEST = 1 << 30  # bytes


class Journal:
    """A file with a line for every batch that is done, so that an interruption loses none of them.

    Every line has a checksum. What follows a damaged line, as the half line of a machine that lost
    its power, does not count and is removed.

    Args:
        path: The file; None to keep nothing.
        setting: What the answers depend on, as plain JSON types; a file of another one is replaced.

    Attributes:
        batches: The answers that are kept, as plain JSON types, by the number of their batch.
    """

    def __init__(self, path: Path | None, setting: Mapping[str, Any]) -> None:
        self._path = path
        self._first = _line({"setting": setting})
        self.batches = {} if path is None else self._read(path)

    def _read(self, path: Path) -> dict[int, list[Mapping[str, Any]]]:
        try:
            data = read_regular(path, _LARGEST)
        except OSError:
            return {}
        first, found, whole = self._first.encode(), dict[int, Any](), 0
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n") or (whole == 0 and line != first):
                break
            if whole:
                try:
                    document = unseal(parse_json(line.decode()))
                    found[document["batch"]] = document["answers"]
                except (ValueError, TypeError, KeyError, AttributeError):
                    break
            whole += len(line)
        if whole == 0:
            path.unlink()
        elif whole < len(data):
            write_atomic(path, data[:whole])
        return found

    def add(self, batch: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Keep the answers to a batch.

        Args:
            batch: Its number.
            answers: They, as plain JSON types.

        Raises:
            OSError: They cannot be written.
        """
        if self._path is not None:
            first = "" if self._path.exists() else self._first
            append(self._path, first + _line({"batch": batch, "answers": list(answers)}))


def _line(document: Mapping[str, Any]) -> str:
    return json.dumps(seal(document)) + "\n"
