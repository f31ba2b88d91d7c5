"""Records as files and as a table."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest

import pore
from pore.bias.position_bias import PositionBias
from pore.errors import InputError
from pore.evaluation.outcome import Answer, Outcome
from pore.evaluation.records import read_records, to_csv, write_records
from pore.evaluation.tables import table
from pore.plotting.labels import budget_label


def records() -> list[dict[str, Any]]:
    answers = tuple(
        Answer(str(i), "q", "x", "x", i < 2, "color", (None, "top")[i % 2], ((0, 1),), 10)
        for i in range(3)
    )
    bias = PositionBias.exponential(0.1, 16)
    return [
        Outcome(None, answers, 1.5).record(),
        Outcome(pore.FastV(keep=0.25, reweight=bias), answers).record(),
        Outcome(pore.Downsample(keep=4), answers, budget=0.25).record(),
    ]


def test_records_as_files(tmp_path: Path) -> None:
    found = records()
    write_records(tmp_path / "new", found)
    assert read_records(tmp_path / "new" / "results.json") == found
    text = (tmp_path / "new" / "results.csv").read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert text == to_csv(found)
    assert [row["method"] for row in rows] == ["unpruned", "FastV", "Downsample"]
    assert rows[1]["reweight"] == "exponential"
    assert float(rows[0]["ci_low"]) == found[0]["ci"][0]
    assert float(rows[0]["kind.color"]) == pytest.approx(2 / 3)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "results.csv",
        "results.json",
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '[{"method": "FastV"}]', "[3]"])
def test_what_is_no_record(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(str(path))):
        read_records(path)


def test_table_has_a_block_for_each_budget() -> None:
    from rich.console import Console

    console = Console(width=200, file=io.StringIO())
    console.print(table(records()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "all visual tokens",
        "unpruned",
        "keep 25 %",
        "FastV + PoRe",
        "Downsample",
    ]
    assert "66.7 [20.8, 93.9]" in text
    console.print(table(records(), parts=("kinds",)))
    assert "[" not in console.file.getvalue()[len(text) :]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("keep", "label"),
    [(0.222, "keep 22.2 %"), (128, "keep 128"), (0.5, "keep 50 %"), (None, "method's own budget")],
)
def test_budget_label(keep: Any, label: str) -> None:
    assert budget_label(keep) == label
