"""Cells that a folder holds from earlier sweeps, in the table of a later one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pore
from helpers.pages import checked_page
from pore._saved.seals import sealed_text
from pore.data.samples import Sample
from pore.evaluation import own
from pore.evaluation.cells import BenchmarkError, Sweep
from pore.evaluation.metrics import metric_named
from pore.evaluation.own import OwnQuestions
from pore.evaluation.results import SurveySettings
from pore.evaluation.store import read_kept
from pore.evaluation.sweeping import OwnBenchmark, sweep
from pore.evaluation.wanted import Setting

SETTINGS = SurveySettings(batch_size=4, max_new_tokens=2, max_bad=0.5)
PLAN = [Setting(None, None, None)] + [Setting(n, None, pore.FastV(keep=n)) for n in (8, 4)]


@pytest.fixture
def run(model: Any, processor: Any, samples: list[Sample], tmp_path: Path) -> Any:
    """Sweeps over samples of one's own, all into one folder."""

    def swept(
        plan: list[Setting],
        name: str = "samples",
        asked: list[Sample] = samples,
        settings: SurveySettings = SETTINGS,
    ) -> Sweep:
        questions = OwnQuestions(model, processor, asked, tmp_path, settings)
        return sweep([OwnBenchmark(questions, name)], plan, tmp_path, circumstances={})

    return swept


def test_a_bad_sample_is_skipped_in_kept_cells_too(
    run: Any, samples: list[Sample], tmp_path: Path
) -> None:
    bad = [*samples[:3], replace(samples[3], image=tmp_path / "gone.png"), *samples[4:]]
    run(PLAN, asked=bad)
    own_again = run(PLAN[:2], asked=bad)  # here FastV at 4 comes from the folder
    beside = run(PLAN[:1], "b", samples[:2])  # and here all of "samples"
    for found, n in ((own_again, 3), (beside, 3)):
        assert len(found.rows) == n
        for one in found.rows:
            outcome = one.cells["samples"].outcome
            assert [skip.number for skip in outcome.skipped] == [3]
            assert len(outcome.scores) == len(samples)
    assert all(one.tokens is not None for one in own_again.rows)  # summed up


def test_files_that_do_not_say_what_was_skipped_are_read(
    run: Any, samples: list[Sample], tmp_path: Path
) -> None:
    """As this version wrote them once: with a bad sample they cannot be compared, else they can."""
    bad = [replace(samples[0], image=tmp_path / "gone.png"), *samples[1:]]
    for name, asked, rows in (("good", samples, 3), ("bad", bad, 2)):
        run(PLAN, name, asked)
        for path in (tmp_path / "answers").glob("*.json"):
            document = read_kept(path)
            for entry in ("skipped", "metric", "circumstances"):
                document.pop(entry, None)
            path.write_text(sealed_text(document))
        found = run(PLAN[:2], name, asked)
        own_rows = [one for one in found.rows if name in one.cells]
        assert len(own_rows) == rows
        assert {one.cells[name].metric for one in own_rows} == {"accuracy"}


def test_the_metric_is_the_one_that_was_asked_for(
    run: Any, samples: list[Sample], tmp_path: Path
) -> None:
    anls = replace(SETTINGS, metric=metric_named("anls"))
    run(PLAN)
    run(PLAN[:2], settings=anls)  # scored anew, and kept so
    found = run(PLAN[:1], settings=anls)
    assert [one.cells["samples"].metric for one in found.rows] == ["ANLS", "ANLS"]
    beside = run(PLAN[:1], "b", samples[:2])
    kept = [one.cells["samples"] for one in beside.rows if "samples" in one.cells]
    assert [cell.metric for cell in kept] == ["ANLS", "ANLS"]  # not FastV at 4 by another rule
    assert {cell.outcome.metric for cell in kept} == {"anls"}


def test_another_benchmark_is_shown_as_it_was_asked_last(run: Any, samples: list[Sample]) -> None:
    run(PLAN, "a", samples[:4])
    run(PLAN[:2], "a", samples[2:])  # other questions under the same name
    found = run(PLAN[:1], "b", samples[:2])
    assert [sorted(one.cells) for one in found.rows] == [["a", "b"], ["a"]]
    ids = [answer.id for answer in found.rows[0].cells["a"].outcome.answers]
    assert ids == [sample.id for sample in samples[2:]]


def test_every_cell_says_under_which_circumstances_it_was_asked(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(commit: str) -> None:
        made = {"versions": {"torch": "1"}, "commit": commit, "hardware": {"cpu": f"of {commit}"}}
        monkeypatch.setattr(own, "surroundings", lambda *_, **__: made)

    def written() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((tmp_path / "sweep.json").read_text())[
            "circumstances_of_cells"
        ]
        return found

    here("first")
    run(PLAN[:2])
    (alone,) = written()
    assert (alone["commit"], alone["versions"]) == ("first", {"torch": "1"})
    assert [cell["method"] for cell in alone["cells"]] == ["unpruned", "FastV"]
    assert "not all asked" not in (tmp_path / "sweep.html").read_text()
    here("second+changes")
    run(PLAN)
    one, two = written()
    assert (one["commit"], two["commit"]) == ("first", "second+changes")
    assert two["cells"] == [
        {"benchmark": "samples", "method": "FastV", "reweight": None, "keep": 4}
    ]
    page = checked_page((tmp_path / "sweep.html").read_text()).text
    assert (
        "not all asked under the same circumstances: 2 with commit first, cpu of first; "
        "1 with commit second+changes, cpu of second+changes." in page
    )


class Unreachable(OwnBenchmark):
    """A benchmark whose data cannot be had."""

    def ask(self, *_: Any) -> Any:
        raise BenchmarkError("it is gated")


def test_a_benchmark_that_cannot_be_asked_is_left_out(
    run: Any, model: Any, processor: Any, samples: list[Sample], tmp_path: Path
) -> None:
    run(PLAN, "gated")  # once it could be
    questions = OwnQuestions(model, processor, samples, tmp_path, SETTINGS)
    others = OwnQuestions(model, processor, samples[:5], tmp_path, SETTINGS)
    gated, good = Unreachable(questions, "gated"), OwnBenchmark(others, "good")
    for order in ([gated, good], [good, gated]):
        found = sweep(order, PLAN, tmp_path, circumstances={})
        assert (found.benchmarks, found.done) == (("good",), True)
        assert [(one.method, one.reason) for one in found.left_out] == [("gated", "it is gated")]
        assert all([*one.cells] == ["good"] and one.tokens is not None for one in found.rows)
        assert json.loads((tmp_path / "sweep.json").read_text())["left_out"]
    with pytest.raises(pore.PoreError, match=r"None of the benchmarks.*gated: it is gated"):
        sweep([gated], PLAN, tmp_path, circumstances={})
