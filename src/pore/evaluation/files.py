"""Results as files: what was asked, under which circumstances, and a record for every setting."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pore._files import shown, write_atomic
from pore._saved.forms import Form
from pore._saved.parsing import read_json
from pore._saved.seals import check, sealed_text
from pore.errors import InputError
from pore.evaluation.records import Record, checked, to_csv

RESULTS, SWEEP, SWEEP_SCORES = "pore.results", "pore.sweep", "pore.sweep_scores"
"""The schemas of results by question, of a sweep's table, and of what its scores are made of."""

OF_A_SWEEP = (
    "it is the table of a sweep. Give scores.json beside it, or the results.json in the folder of "
    "one of its benchmarks."
)
"""What to do with the table of a sweep where single scores are needed."""

_RESULTS = Form(
    RESULTS,
    "file of results",
    InputError,
    {"circumstances": dict, "questions": list, "results": list},
    elsewhere={
        SWEEP: OF_A_SWEEP,
        SWEEP_SCORES: "it holds the scores of a whole sweep; give two of one kind.",
    },
)


_DIFFERENCES = Form(
    "pore.differences",
    "file of differences",
    InputError,
    {"circumstances": dict, "differences": list},
)


@dataclass(frozen=True)
class Results:
    """What a `results.json` holds.

    Attributes:
        circumstances: As from `circumstances.circumstances`; empty for a file that is older.
        questions: As from `outcome.questions_of`; empty for a file that is older.
        records: A record for every setting, each with the fields `records.FIELDS`.
    """

    circumstances: Mapping[str, Any]
    questions: Sequence[Mapping[str, Any]]
    records: Sequence[Record]


def write_results(folder: str | os.PathLike[str], results: Results) -> tuple[Path, Path]:
    """Write `results.json`, all of it, and `results.csv`, one row for each record.

    Args:
        folder: Where; made if missing.
        results: What to write.

    Returns:
        The two paths.

    Raises:
        OSError: They cannot be written.
    """
    entries = {
        "circumstances": dict(results.circumstances),
        "questions": list(results.questions),
        "results": list(results.records),
    }
    text = sealed_text(_RESULTS.document(entries))
    return (
        write_atomic(Path(folder) / "results.json", text),
        write_atomic(Path(folder) / "results.csv", to_csv(results.records)),
    )


def write_differences(
    folder: str | os.PathLike[str],
    differences: Iterable[Mapping[str, Any]],
    circumstances: Mapping[str, Any],
) -> Path:
    """Write `differences.json`.

    Args:
        folder: Where; made if missing.
        differences: What `Difference.record` gives.
        circumstances: As in `Results`.

    Returns:
        The path.

    Raises:
        OSError: It cannot be written.
    """
    entries = {"circumstances": dict(circumstances), "differences": list(differences)}
    text = sealed_text(_DIFFERENCES.document(entries))
    return write_atomic(Path(folder) / "differences.json", text)


def read_results(path: str | os.PathLike[str]) -> Results:
    """Read a `results.json`.

    Args:
        path: The file.

    Returns:
        Its content; fields of records that are not known are ignored.

    Raises:
        InputError: It holds no results, a record that no evaluation can have written, or content
            that does not match its checksum.
        OSError: It cannot be read, or is too large.
    """
    name = shown(path)
    try:
        document = read_json(path, _RESULTS.most)
        if isinstance(document, list):  # as older versions wrote it, each record with a checksum
            return _older(document, name)
        return _RESULTS.read(document, lambda entries: _results(entries, name))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{name} holds no results, or is damaged: {error}") from error


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a `results.json`, read as by `read_results`."""
    return list(read_results(path).records)


def _results(entries: Mapping[str, Any], name: str) -> Results:
    records = [checked(record, name) for record in entries["results"]]
    if not records:
        raise InputError(f"{name} holds no list of results.")
    questions = entries["questions"]
    for one in questions:
        if not isinstance(one, dict) or not {"id", "asked", "kind", "third"} <= one.keys():
            raise ValueError("a question is without id, asked, kind or third.")
    for record in records:
        if record["scores"] is not None and len(record["scores"]) != len(questions):
            raise ValueError("a result has not as many scores as there are questions.")
    return Results(entries["circumstances"], questions, records)


def _older(listed: list[Any], name: str) -> Results:
    if not listed:
        raise InputError(f"{name} holds no list of results.")
    records = [checked(record, name) for record in listed]
    for number, record in enumerate(listed, 1):
        try:
            check(record)
        except ValueError as error:
            raise InputError(f"{name}, result {number}: {error}") from error
    return Results({}, (), records)
