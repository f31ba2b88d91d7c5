"""Published tables: what is run for them, and the pages with both numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from cases.qwen_vl import Qwen25VL
from pore.evaluation.cells import Cell, Sweep, row
from pore.evaluation.guided import Guiding
from pore.evaluation.harness.benchmarks import BENCHMARKS, OTHERS
from pore.evaluation.outcome import Answer, Outcome
from pore.evaluation.published import AVERAGE, PublishedTable
from pore.evaluation.published_tables import QWEN25VL, TABLE1, TABLES
from pore.evaluation.results import SurveySettings
from pore.evaluation.wanted import Corrections, planned, read_wanted

DOCS = Path(__file__).parents[2] / "docs"
MADE = {"command": "pore evaluate --table x", "seed": 0}


def cell(right: int) -> Cell:
    """A benchmark of ten questions."""
    answers = tuple(
        Answer(str(i), "q", "x", "x", i < right, None, None, (), 100) for i in range(10)
    )
    return Cell.of(Outcome(None, answers))


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_row_and_column_is_there(table: PublishedTable) -> None:
    assert {len(values) for values in table.values.values()} == {len(table.columns)}
    rows = [(share, name) for share in table.keeps for name in table.methods]
    assert list(table.values) == [(1.0, "unpruned"), *rows]
    known = {one.task: one for one in (*BENCHMARKS, *OTHERS)}
    for task in table.tasks.values():
        assert known[task].scored == "here"
        assert known[task].metric is not None
    assert len(read_wanted(table.wanted)) == len(table.wanted)
    rows = len(table.wanted) * len(table.keeps)
    assert len(table.commands()) == len(table.tasks) * rows + len(table.judged) * (rows + 1)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_document_is_what_the_code_gives(table: PublishedTable) -> None:
    name = {"table1": "table1.md"}.get(table.name, f"table-{table.name}.md")
    assert table.markdown() in (DOCS / name).read_text()


def test_averages_are_those_of_the_columns() -> None:
    """So that no digit was copied wrongly; the source rounds to two decimals."""
    assert list(QWEN25VL.columns)[-1] == AVERAGE
    *unpruned, _ = QWEN25VL.values[1.0, "unpruned"]
    for (share, name), (*values, average) in QWEN25VL.values.items():
        ratios = [one / other for one, other in zip(values, unpruned, strict=True)]
        assert 100 * sum(ratios) / len(ratios) == pytest.approx(average, abs=0.02), (share, name)


def test_our_numbers_beside_those_of_table_1(tmp_path: Path) -> None:
    assert [TABLE1.shown(share) for share in (1.0, *TABLE1.keeps)] == [
        *("576", "288", "144", "128", "58")
    ]
    rows = (
        row(("unpruned", None, None), {"llava_gqa": cell(6)}, {}, []),
        row(("FastV", "pore", 128), {"llava_gqa": cell(5)}, {}, []),
        row(("FastV", "pore", 100), {"llava_gqa": cell(4)}, {}, []),
    )
    found = Sweep(tuple(TABLE1.tasks.values()), rows, (), MADE)
    assert TABLE1.measured(found) == {
        (1.0, "unpruned", "GQA"): "60.0 [31.3, 83.2]",
        (128 / 576, "FastV + PoRe", "GQA"): "50.0 [23.7, 76.3]",
    }
    page = TABLE1.write_page(found, tmp_path)
    assert page.name == "table1.html"
    assert "57.9<br><b>50.0 [23.7, 76.3]</b>" in page.read_text()
    assert "| 128 | FastV + PoRe | 75.7 (–) | 57.9 (50.0 [23.7, 76.3]) |" in TABLE1.markdown(found)


def test_our_numbers_beside_those_of_qwen(tmp_path: Path) -> None:
    unpruned, pruned = {"ai2d": cell(8)}, {"ai2d": cell(6)}
    rows = (
        row(("unpruned", None, None), unpruned, unpruned, ["ai2d"]),
        row(("SCOPE", None, 0.1), pruned, unpruned, ["ai2d"]),
    )
    found = Sweep(("ai2d",), rows, (), MADE)
    assert QWEN25VL.measured(found)[0.1, "SCOPE", "AI2D"] == "60.0 [31.3, 83.2]"
    assert QWEN25VL.measured(found)[0.1, "SCOPE", AVERAGE].startswith("75.0 [")
    text = QWEN25VL.write_page(found, tmp_path).read_text()
    assert "71.63<br><b>60.0 [31.3, 83.2]</b>" in text
    assert "85.39<br><b>–</b>" in text  # VisionSelector


def test_the_methods_run_on_the_model_of_the_table(tmp_path: Path) -> None:
    model = Qwen25VL().build()
    settings = SurveySettings(keeps=QWEN25VL.keeps)
    corrections = Corrections(model, None, list, "cal", tmp_path, settings)
    guiding = Guiding(model, None, max_new_tokens=2, itself=True)
    plan, left_out = planned(model, read_wanted(QWEN25VL.wanted), settings, corrections, guiding)
    assert not left_out
    assert [(one.named[0], one.keep) for one in plan[1:]] == [
        (name, share)
        for share in QWEN25VL.keeps
        for name, wanted in QWEN25VL.methods.items()
        if wanted is not None
    ]
