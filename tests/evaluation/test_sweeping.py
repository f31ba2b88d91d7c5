"""Sweeps over one's own questions: rows, files, and what is asked after an interruption."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import pore
from helpers.pages import checked_page
from helpers.together import together
from pore._processes import Processes
from pore._screen import Screen
from pore.cli.sweeping import tables
from pore.data.samples import Sample
from pore.errors import BudgetError, InputError
from pore.evaluation import own
from pore.evaluation.cells import Cell, Sweep, asks_for, row
from pore.evaluation.files import read_results
from pore.evaluation.guided import Guiding
from pore.evaluation.outcome import Answer, Outcome
from pore.evaluation.own import OwnQuestions
from pore.evaluation.results import SurveySettings
from pore.evaluation.store import Store
from pore.evaluation.sweep_files import to_csv, to_latex
from pore.evaluation.sweep_page import to_html
from pore.evaluation.sweeping import OwnBenchmark, sweep
from pore.evaluation.wanted import Corrections, Setting, Wanted, planned, read_wanted, texts
from processors import KINDS
from processors.base import parts_or_skip

SETTINGS = SurveySettings(keeps=(8, 4), batch_size=4, max_new_tokens=2)

MADE = {"command": "pore evaluate --methods a & b", "seed": 0}


def cell(right: int, n: int = 10, *, value: float | None = None, pruner: Any = None) -> Cell:
    """A benchmark of `n` questions, of which the first are right; with a value it is no mean."""
    answers = tuple(
        Answer(str(i), "q", "x", "x", i < right, None, None, (), 100, 4, 5.0) for i in range(n)
    )
    outcome = Outcome(pruner, answers)
    if value is not None:
        return Cell(outcome, "points", value, None)
    low, high = outcome.ci
    return Cell(outcome, "accuracy", 100 * outcome.accuracy, (100 * low, 100 * high))


@dataclass
class Fake:
    """A benchmark that counts what it is asked."""

    name: str
    fails: tuple[int, ...] = ()
    asked: list[Any] = field(default_factory=list)

    @property
    def store(self) -> Store:
        return Store(Path("nowhere"), {})

    def ask(self, pruner: Any, advance: Any, named: Any) -> Cell:
        keep = getattr(pruner, "keep", None)
        self.asked.append(keep)
        if keep in self.fails:
            raise BudgetError("no such grid")
        advance(1)
        return cell(10 if keep is None else keep, pruner=pruner)

    def release(self) -> None:
        self.asked.append("release")


PLAN = [
    Setting(None, None, None),
    Setting(8, None, pore.FastV(keep=8)),
    Setting(4, None, pore.FastV(keep=4)),
]


# -- rows -----------------------------------------------------------------------------------------


def test_a_row_is_the_mean_of_ratios() -> None:
    unpruned = {"a": cell(8), "textvqa": cell(5), "mme": cell(0, value=1500.0)}
    cells = {"a": cell(4), "textvqa": cell(4), "mme": cell(0, value=1200.0)}
    found = row(("FastV", None, 4), cells, unpruned, list(cells))
    assert found.relative == pytest.approx((0.5 + 0.8 + 0.8) / 3)
    assert found.relative_by == {"other": pytest.approx(0.65), "OCR": pytest.approx(0.8)}
    assert found.relative_ci is None  # MME's score is no mean over questions
    assert (found.tokens, found.mean_tokens, found.flops) == (4.0, 5.0, 100.0)
    means = row(("FastV", None, 4), {"a": cells["a"]}, unpruned, ["a"])
    assert means.relative_ci is not None
    assert means.relative_ci[0] < 0.5 < means.relative_ci[1]
    assert means.relative_by == {}


def test_a_row_without_all_cells_has_no_mean() -> None:
    assert row(("FastV", None, 4), {"a": cell(4)}, {"a": cell(8)}, ["a", "b"]).relative is None


@pytest.mark.parametrize(
    ("name", "what"),
    [("llava_textvqa", "OCR"), ("refcoco_bbox_val", "grounding"), ("gqa", "other")],
)
def test_what_benchmarks_ask_for(name: str, what: str) -> None:
    assert asks_for(name) == what


# -- names ----------------------------------------------------------------------------------------


def test_methods_by_name() -> None:
    names = texts(["fastv, pore", "sparsevlm+", "sparsevlm++rope", "PORE"])
    assert read_wanted(names) == (
        Wanted("FastV"),
        Wanted("FastV", "pore"),
        Wanted("SparseVLM+"),
        Wanted("SparseVLM+", "rope"),
    )
    for name, why in (
        ("fastw", "no method 'fastw'"),
        ("fastv+poor", "no correction 'poor'.*pore, rope, without-rope"),
        ("random+pore", "'random.pore' means nothing"),
    ):
        with pytest.raises(InputError, match=why):
            read_wanted([name])


def test_p_is_measured_once_for_all_budgets(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path
) -> None:
    given: list[int] = []

    def calibration() -> list[Sample]:
        given.append(1)
        return samples

    corrections = Corrections(model, processor, calibration, "cal", tmp_path, SETTINGS)
    guiding = Guiding(model, processor, max_new_tokens=2, itself=True)
    wanted = read_wanted(["fastv", "pore", "fastv+without-rope", "scored"])
    plan, left_out = planned(model, wanted, SETTINGS, corrections, guiding)
    assert [setting.named for setting in plan] == [
        ("unpruned", None, None),
        *(("FastV", name, keep) for keep in (8, 4) for name in (None, "pore", "without-rope")),
    ]
    assert len(given) == 1
    assert [one.method for one in left_out] == ["Scored", "Scored"]
    first, second = (s.pruner.reweight for s in plan if s.correction == "pore" and s.pruner)  # type: ignore[attr-defined]
    assert first == second
    assert (tmp_path / "profiles" / "fastv-1.json").exists()
    own_p = replace(corrections, given=[first])
    plan, _ = planned(model, read_wanted(["pore"]), SETTINGS, own_p, guiding)
    assert plan[1].pruner.reweight is first  # type: ignore[union-attr]
    assert len(given) == 1


@pytest.mark.parametrize("name", ["InternVL", "Gemma 4"])
def test_images_of_any_size_keep_a_share_of_each(name: str, tmp_path: Path) -> None:
    (kind,) = (kind for kind in KINDS if kind.name == name)
    processor, model = parts_or_skip(kind)
    corrections = Corrections(model, processor, list, "cal", tmp_path, SETTINGS)
    guiding = Guiding(model, processor, max_new_tokens=2, itself=True)
    shares = replace(SETTINGS, keeps=(0.5, 0.25))
    plan, left_out = planned(model, read_wanted(["divprune"]), shares, corrections, guiding)
    assert not left_out
    assert [one.named for one in plan[1:]] == [("DivPrune", None, 0.5), ("DivPrune", None, 0.25)]


# -- a sweep --------------------------------------------------------------------------------------


def test_one_benchmark_after_the_other(tmp_path: Path) -> None:
    one, other = Fake("a"), Fake("b", fails=(4,))
    told: list[Any] = []
    found = sweep(
        [one, other], PLAN, tmp_path, circumstances=MADE, progress=lambda *now: told.append(now)
    )
    assert one.asked == other.asked == [None, 8, 4, "release"]
    assert [r.relative for r in found.rows] == [1.0, 0.8, None]
    assert [(left.method, left.keep, left.reason) for left in found.left_out] == [
        ("FastV on b", 4, "no such grid")
    ]
    assert told[-1] == ("done", 1.0)
    assert found.done  # what failed would fail again
    document = json.loads((tmp_path / "sweep.json").read_text())
    assert document["circumstances"] == MADE
    assert document["rows"][1]["benchmarks"]["a"]["value"] == 80.0
    assert [len(r["benchmarks"]) for r in document["rows"]] == [2, 2, 1]
    for name in "ab":
        assert len(read_results(tmp_path / name / "results.json").questions) == 10
    with pytest.raises(BudgetError):  # without the unpruned model nothing is relative
        sweep([Fake("c", fails=(None,))], PLAN, tmp_path, circumstances=MADE)  # type: ignore[arg-type]


def test_the_table_as_files(tmp_path: Path) -> None:
    found = sweep([Fake("a_b"), Fake("c")], PLAN, tmp_path, circumstances=MADE)
    headings, *rows = csv.reader(io.StringIO(to_csv(found)))
    assert headings[6:9] == ["a_b", "a_b.low", "a_b.high"]
    shown = dict(zip(headings, rows[2], strict=True))
    assert (shown["method"], shown["keep"], shown["a_b"]) == ("FastV", "4", "40.0")
    assert float(shown["relative"]) == pytest.approx(0.4)
    latex = to_latex(found)
    assert r"a\_b & c & Relative \\" in latex
    number = r"40.0 {\scriptsize [16.8, 68.7]}"
    assert rf"FastV & 4 & 0.0000001 & {number} & {number} & 40.0\,\% {{\scriptsize [" in latex
    assert latex.count("&") == 4 * 5
    page = to_html(found)
    checked_page(page)
    assert "pore evaluate --methods a &amp; b" in page
    assert "All cells are done." in page
    assert "<b>40.0</b>" in page
    missing = Sweep(("a",), (row(("FastV", None, 4), {}, {}, ["a"]),), (), waiting=1)
    assert "Not done, of what the command asks for: 1" in to_html(missing)
    assert "FastV & - & ? & - & - " in to_latex(missing)


@pytest.mark.parametrize("width", [80, 120, 10_000])
def test_the_table_on_a_screen(tmp_path: Path, width: int) -> None:
    """Every benchmark is shown, beside or below the others, and nothing is cut or folded."""
    names = ["vqav2_val", "gqa", "vizwiz_vqa_val", "textvqa_val", "pope", "mme"]
    found = sweep([Fake(name) for name in names], PLAN, tmp_path, circumstances=MADE)
    screen = Screen(file=io.StringIO(), width=width)
    made = list(tables(found, width))
    for each in made:
        screen.print(each)
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert all(name in text for name in (*names, "relative, %", "GFLOPs"))
    assert text.count("40.0 [16.8, 68.7]") == len(names)
    assert len(made) == {80: 4, 120: 3, 10_000: 1}[width]


def test_interrupted_and_resumed_to_the_same_table(
    model: Any,
    processor: Any,
    samples: list[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = [*PLAN, Setting(4, None, pore.Downsample(keep=4))]

    def run(out: Path) -> Sweep:
        questions = OwnQuestions(model, processor, samples, out, SETTINGS)
        return sweep([OwnBenchmark(questions)], plan, out, circumstances=MADE)

    whole = run(tmp_path / "whole")
    asked: list[Any] = []
    evaluate = own.evaluate

    def stopped(model: Any, processor: Any, batches: Any, pruner: Any, **more: Any) -> Outcome:
        if pruner not in asked:  # it is called for every batch
            if len(asked) == 2:
                raise KeyboardInterrupt
            asked.append(pruner)
        return evaluate(model, processor, batches, pruner, **more)

    monkeypatch.setattr(own, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt, match="2 of 4 cells are done and kept"):
        run(tmp_path / "cut")
    assert asked == [None, PLAN[1].pruner]
    asked.clear()
    resumed = run(tmp_path / "cut")
    assert asked == [setting.pruner for setting in plan[2:]]
    assert to_csv(resumed) == to_csv(whole)
    for name in ("sweep.csv", "sweep.tex", "sweep.html", "sweep.json", "samples/results.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    records = read_results(tmp_path / "cut" / "samples" / "results.json").records
    assert [record["keep"] for record in records] == [1.0, 8, 4, 4]
    assert records[2]["accuracy_by_downsample"] or not records[2]["accuracy"]


def test_a_narrower_sweep_keeps_what_the_folder_holds(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path
) -> None:
    def run(
        name: str, plan: list[Setting], asked: list[Sample] = samples, longest: int = 2
    ) -> Sweep:
        settings = replace(SETTINGS, max_new_tokens=longest)
        questions = OwnQuestions(model, processor, asked, tmp_path, settings)
        return sweep([OwnBenchmark(questions, name)], plan, tmp_path, circumstances=MADE)

    whole = run("a", PLAN)
    written = (tmp_path / "sweep.csv").read_text()
    records = read_results(tmp_path / "a" / "results.json").records
    narrow = run("a", PLAN[:2])
    assert [one.record() for one in narrow.rows] == [one.record() for one in whole.rows]
    assert (tmp_path / "sweep.csv").read_text() == written
    assert read_results(tmp_path / "a" / "results.json").records == records
    both = run("b", PLAN[:2], samples[:5])
    assert both.benchmarks == ("b", "a")
    assert [sorted(one.cells) for one in both.rows] == [["a", "b"], ["a", "b"], ["a"]]
    assert [one.tokens is None for one in both.rows] == [False, False, True]  # not all cells
    assert both.done
    other = run("a", PLAN[:1], longest=1)  # which asks anew: nothing of before is comparable
    assert [one.method for one in other.rows] == ["unpruned"]
    assert other.benchmarks == ("a",)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.slow
def test_processes_share_every_cell(
    size: int,
    model: Any,
    processor: Any,
    samples: list[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bad samples too: whoever finds one, all leave it out; files are those of one process."""
    asked: list[list[int]] = []
    evaluate = own.evaluate
    monkeypatch.setattr(
        own,
        "evaluate",
        lambda *args, **more: (
            asked.append(args[2].own(more["part"], args[3])) or evaluate(*args, **more)
        ),
    )
    plan = [*PLAN, Setting(4, None, pore.Random(keep=4))]  # whose draws go on from batch to batch
    many = [replace(each, id=f"{i}-{each.id}") for i in range(5) for each in samples]
    many[5] = replace(many[5], image=tmp_path / "gone.png")
    settings = replace(SETTINGS, max_bad=0.1)

    def run(processes: Processes, out: Path) -> Sweep:
        questions = OwnQuestions(model, processor, many, out, settings, processes)
        return sweep([OwnBenchmark(questions)], plan, out, circumstances=MADE, processes=processes)

    alone = run(Processes(), tmp_path / "alone")
    assert asked == [*([i] for _ in PLAN for i in range(9)), [*range(9)]]
    asked.clear()
    for _ in range(2):  # the second time nothing is asked
        found = together(size, lambda processes: run(processes, tmp_path / "shared"))
        assert [one.rows == alone.rows for one in found] == [True] * size  # type: ignore[union-attr]
        parts = [[*range(rank, 9, size)] for rank in range(size) for _ in PLAN]
        assert sorted(asked) == sorted([*parts, [*range(9)], *[[]] * (size - 1)])
    files = [p.relative_to(tmp_path / "alone") for p in (tmp_path / "alone").rglob("*.*")]
    assert len(files) == 5 + 2 + len(plan)
    for name in files:
        both = [(tmp_path / folder / name).read_bytes() for folder in ("alone", "shared")]
        assert both[0] == both[1], name
    records = read_results(tmp_path / "shared" / "samples" / "results.json").records
    assert [one["skipped"][0]["id"] for one in records] == ["0-" + samples[5].id] * len(plan)
