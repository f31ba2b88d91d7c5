"""Results as files."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pore._files import shown, write_atomic
from pore._saved.parsing import read_json
from pore._saved.seals import check, sealed_list
from pore._text import for_csv
from pore.errors import InputError
from pore.evaluation.outcome import Difference

Record = Mapping[str, Any]


FIELDS = (
    "method",
    "reweight",
    "keep",
    "layer",
    "accuracy",
    "ci",
    "accuracy_by_kind",
    "accuracy_by_third",
    "n",
    "skipped",
    "tokens_after",
    "mean_tokens",
    "acts_in",
    "looks_at",
    "guide",
    "flops",
    "prefill_ms",
    "model",
    "revision",
    "weights",
)


"""The fields of a record, in order; a file adds a checksum to each record."""


_MAX_BYTES = 64 << 20


_LARGEST = 1e30  # of FLOPs


# For results that were written before these fields existed.
_LATER: dict[str, Any] = {
    "skipped": [],
    "mean_tokens": None,
    "acts_in": None,
    "looks_at": [],
    "guide": None,
    "model": None,
    "revision": None,
    "weights": None,
}


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _LARGEST


def _share(value: Any) -> bool:
    return _number(value) and value <= 1


def _shares(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_share, value.values()))


def _list(value: Any, right: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(right, value))


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _skip(value: Any) -> bool:
    return isinstance(value, dict) and all(_text(value.get(name)) for name in ("id", "reason"))


def _or_none(right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or right(value)


# What the fields that are read elsewhere may hold; other fields depend on the method.
_RIGHT: dict[str, Callable[[Any], bool]] = {
    "method": _text,
    "reweight": _or_none(_text),
    "keep": _or_none(lambda value: _text(value) or _number(value) or _list(value, _number)),
    "accuracy": _share,
    "ci": lambda value: _list(value, _share) and len(value) == 2 and value[0] <= value[1],
    "accuracy_by_kind": _shares,
    "accuracy_by_third": _shares,
    "n": lambda value: type(value) is int and 1 <= value <= _LARGEST,
    "skipped": lambda value: _list(value, _skip),
    "tokens_after": _number,
    "mean_tokens": _or_none(_number),
    "acts_in": _or_none(_text),
    "looks_at": lambda value: _list(value, lambda one: type(one) is int),
    "guide": _or_none(_text),
    "flops": _or_none(_number),
    "prefill_ms": _or_none(_number),
    **dict.fromkeys(("model", "revision", "weights"), _or_none(_text)),
}


def write_records(folder: str | os.PathLike[str], records: Sequence[Record]) -> tuple[Path, Path]:
    """Write `results.json`, a list of records, and `results.csv`, one row for each.

    Args:
        folder: Where; made if missing.
        records: What `Outcome.record` gives.

    Returns:
        The two paths.

    Raises:
        OSError: They cannot be written.
    """
    return (
        write_atomic(Path(folder) / "results.json", sealed_list(records)),
        write_atomic(Path(folder) / "results.csv", to_csv(records)),
    )


def write_differences(folder: str | os.PathLike[str], differences: Iterable[Difference]) -> Path:
    """Write `differences.json`, a list of what `Difference.record` gives.

    Args:
        folder: Where; made if missing.
        differences: The differences.

    Returns:
        The path.

    Raises:
        OSError: It cannot be written.
    """
    text = sealed_list(each.record() for each in differences)
    return write_atomic(Path(folder) / "differences.json", text)


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Read a `results.json`.

    Args:
        path: The file.

    Returns:
        Its records, each with the fields `FIELDS`; other fields are ignored.

    Raises:
        InputError: It holds no records, a record that no evaluation can have written, or one that
            does not match its checksum.
        OSError: It cannot be read, or is too large.
    """
    name = shown(path)
    try:
        listed = read_json(path, _MAX_BYTES)
    except ValueError as error:
        raise InputError(f"{name} holds no results, or is damaged: {error}") from error
    if not isinstance(listed, list) or not listed:
        raise InputError(f"{name} holds no list of results.")
    records: list[Record] = []
    for number, record in enumerate(listed, 1):
        if not isinstance(record, dict) or not set(FIELDS) <= (record | _LATER).keys():
            raise InputError(f"{name} has a result without all of {', '.join(FIELDS)}.")
        records.append({field: (_LATER | record)[field] for field in FIELDS})
        for field, right in _RIGHT.items():
            if not right(records[-1][field]):
                raise InputError(
                    f"{name} has a result with {record.get(field)!r:.60} for {field}, which "
                    "cannot be."
                )
        try:
            check(record)
        except ValueError as error:
            raise InputError(f"{name}, result {number}: {error}") from error
    return records


def to_csv(records: Iterable[Record]) -> str:
    """Records as CSV, nested fields as columns such as `kind.color` and `third.top`.

    Text that a spreadsheet would take for a formula has an apostrophe before it (`for_csv`).
    """
    records = list(records)
    rows = []
    for record in records:
        row: dict[str, Any] = {}
        for name in FIELDS:
            if name == "ci":
                row["ci_low"], row["ci_high"] = record[name]
            elif name == "skipped":
                row[name] = len(record[name])
            elif name == "looks_at":
                row[name] = " ".join(map(str, record[name]))
            elif name.startswith("accuracy_by_"):
                prefix = name.removeprefix("accuracy_by_")
                row |= {f"{prefix}.{group}": share for group, share in record[name].items()}
            else:
                row[name] = record[name]
        rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(map(for_csv, columns))
    for row in rows:
        writer.writerow(for_csv(row.get(column)) for column in columns)
    return buffer.getvalue()
