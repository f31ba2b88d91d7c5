"""Records as files and as a table."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest

import pore
from pore.bench.results import Spread
from pore.bias.position_bias import PositionBias
from pore.errors import InputError
from pore.evaluation.batches import Skipped
from pore.evaluation.files import Results, read_records, read_results, write_results
from pore.evaluation.outcome import Answer, Outcome, questions_of, records_of
from pore.evaluation.records import to_csv
from pore.evaluation.statistics import wilson
from pore.evaluation.tables import share, table
from pore.plotting.labels import budget_label

MADE = {"seed": 3, "command": "pore evaluate"}


def outcomes() -> list[Outcome]:
    answers = tuple(
        Answer(str(i), "q", "x", "x", i < 2, "color", (None, "top")[i % 2], ((0, 1),), 10)
        for i in range(3)
    )
    bias = PositionBias.exponential(0.1, 16)
    return [
        Outcome(None, answers, Spread((1.5,))),
        Outcome(pore.FastV(keep=0.25, reweight=bias), answers),
        Outcome(pore.Downsample(keep=4), answers, budget=0.25),
    ]


def records() -> list[dict[str, Any]]:
    return records_of(outcomes())


def test_records_as_files(tmp_path: Path) -> None:
    found = records()
    write_results(tmp_path / "new", Results(MADE, questions_of(outcomes()), found))
    assert read_records(tmp_path / "new" / "results.json") == found
    assert read_results(tmp_path / "new" / "results.json").circumstances == MADE
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
    console.print(table(records(), parts=("downsample",)))
    split = console.file.getvalue()[len(text) :]  # type: ignore[attr-defined]
    assert re.search("method *wrong *right", split)
    assert "100.0 [34, 100]" in split
    assert "66.7" not in split


def test_groups_of_older_files_have_no_interval() -> None:
    (one, *_) = records()
    assert share(one, "kind", "color") == ("66.7", "[21, 94]")
    assert share({**one, "ci_by_kind": {}}, "kind", "color") == ("66.7", "")
    assert share(one, "kind", "shape") == ("-", "")


@pytest.mark.parametrize(
    ("keep", "label"),
    [(0.222, "keep 22.2 %"), (128, "keep 128"), (0.5, "keep 50 %"), (None, "method's own budget")],
)
def test_budget_label(keep: Any, label: str) -> None:
    assert budget_label(keep) == label


def test_groups_have_intervals_and_a_split_by_downsample() -> None:
    unpruned, fastv, smaller = records()
    assert unpruned["accuracy_by_kind"] == {"color": pytest.approx(2 / 3)}
    assert unpruned["ci_by_kind"]["color"] == unpruned["ci"]
    assert unpruned["ci_by_third"]["top"] == list(wilson(1, 1))
    assert unpruned["accuracy_by_downsample"] == {}  # at another budget
    for record in (fastv, smaller):  # they answer alike here
        assert record["accuracy_by_downsample"] == {"right": 1.0, "wrong": 0.0}
        assert record["ci_by_downsample"]["right"] == list(wilson(2, 2))
    assert unpruned["scores"] == [1, 1, 0]


def test_scores_are_in_the_places_of_the_samples() -> None:
    first, second = (Answer(one, "q", "x", "x", True, None, None, ((0,),), 1) for one in "ac")
    outcome = Outcome(None, (first, second), skipped=(Skipped(1, "b", "no picture"),))
    assert outcome.scores == [1, None, 1]
    assert [one["id"] for one in questions_of([outcome])] == ["a", "b", "c"]
    known = [one["asked"] is not None for one in questions_of([outcome])]
    assert known == [True, False, True]


def test_results_have_as_many_scores_as_questions(tmp_path: Path) -> None:
    path, _ = write_results(tmp_path, Results({}, (), records()))
    with pytest.raises(InputError, match="as many scores as there are questions"):
        read_results(path)
