"""Results as files and as a table."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pore._files import shown, write_atomic
from pore._saved.parsing import read_json
from pore._saved.seals import check, sealed_list
from pore._text import cell, for_csv
from pore.errors import InputError
from pore.methods.registry import methods
from pore.plotting.labels import UNPRUNED, budget_label, label

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

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


# Results written before these fields came are read all the same.
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


# What a field that others read can be; the rest, of methods of any kind, is not looked at.
_RIGHT: dict[str, Callable[[Any], bool]] = {
    "method": _text,
    "reweight": _or_none(_text),
    "keep": _or_none(lambda value: _text(value) or _number(value) or _list(value, _number)),
    "accuracy": _share,
    "ci": lambda value: _list(value, _share) and len(value) == 2 and value[0] <= value[1],
    "accuracy_by_kind": _shares,
    "accuracy_by_third": _shares,
    "n": lambda value: type(value) is int and 1 <= value <= _LARGEST,
    "skipped": lambda value: _list(
        value,
        lambda one: isinstance(one, dict) and all(_text(one.get(k)) for k in ("id", "reason")),
    ),
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
        Its records, each of `FIELDS`; other fields are passed over.

    Raises:
        InputError: It holds no records, some that no evaluation can have given, or one that does
            not match its checksum.
        OSError: It cannot be read, or is larger than any.
    """
    name = shown(path)
    try:
        found = read_json(path, _MAX_BYTES)
    except ValueError as error:
        raise InputError(f"{name} holds no results, or is damaged: {error}") from error
    if not isinstance(found, list) or not found:
        raise InputError(f"{name} holds no list of results.")
    records: list[Record] = []
    for number, record in enumerate(found, 1):
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


def groups(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Records by budget, in order of first appearance."""
    found: dict[str, list[Record]] = {}
    for record in records:
        unpruned = record["method"] == UNPRUNED
        name = "all visual tokens" if unpruned else budget_label(record["keep"])
        found.setdefault(name, []).append(record)
    return list(found.items())


def percent(share: float) -> str:
    """A share as a percentage with one decimal, without its sign."""
    return f"{100 * share:.1f}"


def number(value: float | None, unit: float = 1.0, digits: int = 3) -> str:
    """A number in a unit, "?" where it is not known."""
    return "?" if value is None else f"{value / unit:.{digits}g}"


def tokens(value: float) -> str:
    """A mean number of tokens: whole where it is."""
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def interval(record: Record) -> str:
    """A record's 95 % interval in percent, such as "[0.0, 17.7]", for it is not symmetric."""
    return f"[{', '.join(map(percent, record['ci']))}]"


def skips(records: Sequence[Record]) -> list[str]:
    """Which samples no method was asked, as a sentence; nothing where all of them were asked."""
    skipped = records[0]["skipped"]
    if not skipped:
        return []
    some = "; ".join(f"{one['id']} ({one['reason']})" for one in skipped[:5])
    more = f"; and {len(skipped) - 5} more, named in results.json" if len(skipped) > 5 else ""
    count = len(skipped) + records[0]["n"]
    return [f"{len(skipped)} of {count} samples are bad and left out of everything: {some}{more}"]


def columns(records: Sequence[Record], field: str) -> list[str]:
    """The groups that records tell accuracy of, in order of first appearance."""
    return list(dict.fromkeys(group for record in records for group in record[field]))


PARTS = ("cost", "accuracy", "kinds", "thirds")


"""The groups of columns of the table."""


TAUGHT, EXPERIMENTAL, GUIDED = "†", "‡", "§"


"""Marks: of methods that look at attention better than a real model's, of those that were built
from a paper's description, and of those that a model guides, whose cost is not counted."""


def marks(record: Record, taught: int | None = None) -> str:
    """The marks of a method in a table, with a space before them.

    Args:
        record: A record of the method.
        taught: The decoder layer from which on attention is better than a real model's, if any.

    Returns:
        The marks, or nothing.
    """
    kind = methods().get(record["method"])
    found = TAUGHT if taught is not None and max(record["looks_at"], default=-1) >= taught else ""
    found += EXPERIMENTAL if kind is not None and kind.experimental else ""
    found += GUIDED if record.get("guide") else ""
    return found and f" {found}"


def table(
    records: Sequence[Record],
    *,
    title: str | None = None,
    parts: Collection[str] = PARTS,
    taught: int | None = None,
) -> Table:
    """Results in the manner of the paper's Table 1: a block of methods for each budget.

    Args:
        records: What `Outcome.record` gives.
        title: Title of the table.
        parts: Which of `PARTS` to show: tokens, FLOPs and time; accuracy; accuracy by kind of
            question; accuracy by third of the image. Also "mean": tokens averaged over layers.
        taught: As in `marks`.

    Returns:
        A table to print with rich.
    """
    from rich import box
    from rich.table import Table

    kinds = columns(records, "accuracy_by_kind") if "kinds" in parts else []
    thirds = columns(records, "accuracy_by_third") if "thirds" in parts else []
    heading = None if title is None else cell(title)
    made = Table(title=heading, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    made.add_column("method", no_wrap=True)
    for name in ("tokens", "GFLOPs", "ms") if "cost" in parts else ():
        made.add_column(name, justify="right", no_wrap=True)
    if "mean" in parts:
        made.add_column("mean", justify="right", no_wrap=True)
    if "accuracy" in parts:
        made.add_column("accuracy", justify="right", no_wrap=True, style="bold")
    for name in (*kinds, *thirds):
        short = name if len(name) <= 6 else f"{name[:5]}."
        made.add_column(cell(short), justify="right", no_wrap=True)
    for budget, block in groups(records):
        made.add_section()
        made.add_row(cell(budget, "bold"))
        for record in block:
            name = f"  {label(record['method'], record['reweight'])}{marks(record, taught)}"
            cells: list[str | Text] = [cell(name)]
            if "cost" in parts:
                cells.append(tokens(record["tokens_after"]))
                cells.append(number(record["flops"], 1e9))
                cells.append(number(record["prefill_ms"]))
            if "mean" in parts:
                cells.append(number(record["mean_tokens"]))
            if "accuracy" in parts:
                cells.append(cell(f"{percent(record['accuracy'])} {interval(record)}"))
            cells += (share(record["accuracy_by_kind"], kind) for kind in kinds)
            cells += (share(record["accuracy_by_third"], third) for third in thirds)
            made.add_row(*cells)
    return made


def share(shares: Mapping[str, float], group: str) -> str:
    """Accuracy of a group as a percentage, "-" where it was asked nothing."""
    return percent(shares[group]) if group in shares else "-"
