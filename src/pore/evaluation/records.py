"""The records of results: their fields, what these may hold, and records as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pore._text import for_csv
from pore.errors import InputError

Record = Mapping[str, Any]


GROUPS = ("kind", "third", "downsample")
"""What questions are grouped by: their kind, the third of the image that they ask about, and
whether Downsample, at the same budget, answers them right or wrong."""

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
    "accuracy_by_downsample",
    *(f"ci_by_{group}" for group in GROUPS),
    "iou",
    "scores",
    "metric",
    "prefill_ms_quartiles",
)
"""The fields of a record, in order."""

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
    "accuracy_by_downsample": {},
    **{f"ci_by_{group}": {} for group in GROUPS},
    "iou": None,
    "scores": None,
    "metric": "exact",
    "prefill_ms_quartiles": None,
}


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _LARGEST


def _share(value: Any) -> bool:
    return _number(value) and value <= 1


def _shares(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_share, value.values()))


def _interval(value: Any) -> bool:
    return _list(value, _share) and len(value) == 2 and value[0] <= value[1]


def _intervals(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_interval, value.values()))


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
    "ci": _interval,
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
    "prefill_ms_quartiles": _or_none(
        lambda value: _list(value, _number) and len(value) == 2 and value[0] <= value[1]
    ),
    **dict.fromkeys(("model", "revision", "weights"), _or_none(_text)),
    **{f"ci_by_{group}": _intervals for group in GROUPS},
    "accuracy_by_downsample": _shares,
    "iou": _or_none(_share),
    "scores": _or_none(lambda value: _list(value, _or_none(_share))),
    "metric": _text,
}


def checked(record: Any, name: str) -> Record:
    """A record as read from a file of any origin, with the fields `FIELDS` and no others.

    Args:
        record: What the file holds.
        name: What messages call the file.

    Raises:
        InputError: No evaluation can have written it.
    """
    if not isinstance(record, dict) or not set(FIELDS) <= (record | _LATER).keys():
        raise InputError(f"{name} has a result without all of {', '.join(FIELDS)}.")
    found = {field: (_LATER | record)[field] for field in FIELDS}
    for field, right in _RIGHT.items():
        if not right(found[field]):
            raise InputError(
                f"{name} has a result with {found[field]!r:.60} for {field}, which cannot be."
            )
    return found


def to_csv(records: Iterable[Record]) -> str:
    """Records as CSV, nested fields as columns such as `kind.color`, `third.top` and
    `third_low.top`, the lower end of its interval.

    Text that a spreadsheet would take for a formula has an apostrophe before it (`for_csv`).
    """
    records = list(records)
    rows = []
    for record in records:
        row: dict[str, Any] = {}
        for name in FIELDS:
            if name == "ci":
                row["ci_low"], row["ci_high"] = record[name]
            elif name.startswith("ci_by_"):
                prefix = name.removeprefix("ci_by_")
                for group, (low, high) in record[name].items():
                    row |= {f"{prefix}_low.{group}": low, f"{prefix}_high.{group}": high}
            elif name == "prefill_ms_quartiles":
                row["prefill_ms_q1"], row["prefill_ms_q3"] = record[name] or (None, None)
            elif name == "scores":
                pass  # one for every question: `results.json` has them
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
