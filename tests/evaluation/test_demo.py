"""The demo as a whole, on a tiny checkpoint folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pore
from helpers.pages import checked_page
from pore.bias.position_bias import PositionBias
from pore.data.loading import load_model
from pore.data.sources import load_samples
from pore.evaluation import demo
from pore.evaluation.differences import compare
from pore.evaluation.files import read_records
from pore.evaluation.findings import facts
from pore.evaluation.headlines import effects, standing
from pore.evaluation.outcome import Answer, Outcome
from pore.evaluation.records import FIELDS
from pore.evaluation.results import About, DemoResult, DemoSettings

SETTINGS = DemoSettings(keeps=(0.5, 0.25), batch_size=4)
ABOUT = About("tiny <model>", "pore demo", "cal", "test", {"machine": "a & b"}, "Because.")


def run_demo(checkpoint: Path, out: Path, **changes: Any) -> DemoResult:
    model, processor = load_model(str(checkpoint))
    given: dict[str, Any] = {
        "calibration": list(load_samples("embedded:calibration", limit=6)),
        "test": list(load_samples("embedded:test", limit=9)),
        "out": out,
        "settings": SETTINGS,
        "about": ABOUT,
    }
    return demo.run(model, processor, **(given | changes))


@pytest.fixture(scope="module")
def shares() -> list[float]:
    return []


@pytest.fixture(scope="module")
def result(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, shares: list[float]
) -> DemoResult:
    out = tmp_path_factory.mktemp("demo")
    return run_demo(checkpoint, out, progress=lambda _, share: shares.append(share))


def test_demo_writes_what_it_says(result: DemoResult) -> None:
    folder = result.report.parent
    assert {path.name for path in folder.iterdir()} == {
        "calibration.json",
        "profile.json",
        "results.json",
        "results.csv",
        "differences.json",
        "figure1.png",
        "figure2.png",
        "figure3.png",
        "answers",
        "examples",
        "report.html",
    }
    found = read_records(folder / "results.json")
    assert found == json.loads(json.dumps(result.records))
    assert all(tuple(record) == FIELDS for record in found)
    methods = ["FastV", "FastV", "FastV", "Random", "Downsample"]
    assert [record["method"] for record in found] == ["unpruned", *methods, *methods]
    assert [r["reweight"] for r in found[1:6]] == [None, "exponential", "rope", None, None]
    assert [r["keep"] for r in found] == [1.0] + [0.5] * 5 + [0.25] * 5
    assert [r["tokens_after"] for r in found] == [16, 8, 8, 8, 8, 9, 4, 4, 4, 4, 4]
    assert all(record["prefill_ms"] > 0 and record["n"] == 9 for record in found)
    assert PositionBias.load(folder / "profile.json") == result.bias
    assert pore.Calibration.load(folder / "calibration.json") == result.calibration
    assert len(json.loads((folder / "differences.json").read_text())["differences"]) == 8


def test_demo_calibrates_on_calibration_samples_only(result: DemoResult) -> None:
    assert result.bias.provenance.samples == 6
    assert result.bias.provenance.source == "cal"


def test_examples_are_chosen_by_rule(result: DemoResult) -> None:
    kinds = [example.title for example in result.examples]
    assert sum("the first question of kind" in title for title in kinds) == 7


def test_report_opens_offline(result: DemoResult) -> None:
    text = result.report.read_text()
    assert "$" not in text
    page = checked_page(text)
    pair = 2 * any(example.only_ours for example in result.examples)
    assert len(page.all("img")) == 3 + pair + 6 * len(result.examples)
    assert len(page.all("source")) == 3  # every figure again, for a phone
    assert "tiny &lt;model&gt;" in text
    assert "a &amp; b" in text


def test_report_says_what_the_numbers_say(result: DemoResult) -> None:
    answers = tuple(
        Answer(str(i), "q", "x", "x", i < 50, None, None, ((0,),), 1) for i in range(100)
    )
    better = tuple(replace(answer, right=True) for answer in answers)
    host = Outcome(pore.FastV(keep=0.5), answers)
    own = Outcome(pore.FastV(keep=0.5, reweight=result.bias), answers)

    def verdict(outcome: Outcome) -> str:
        return effects([compare(host, outcome)], "FastV")

    assert verdict(own) == "PoRe makes no clear difference at keep 50 %."
    assert "clearly more questions right" in verdict(replace(own, answers=better))
    worse = tuple(replace(answer, right=False) for answer in answers)
    line = verdict(replace(own, answers=worse))
    assert "clearly fewer questions right at keep 50 % (−50.0 points)" in line
    records = [Outcome(None, better).record(), host.record(), replace(own, answers=worse).record()]
    said = standing(records, records[1:], records[2])
    assert "FastV + PoRe answers 0.0 % of 100 questions right, and the unpruned model 100" in said
    assert said.endswith("100.0 points are lost. At the same budget FastV 50.0 % gets more.")
    backwards = replace(result, bias=PositionBias.exponential(-0.1, 16))
    assert "favours the first visual token over the last" in facts(backwards)[1]


@pytest.mark.slow
def test_interrupted_demo_leaves_whole_files(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def progress(what: str, share: float) -> None:
        told.append(what)
        assert 0 <= share <= 1
        if "keep 25 %" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_demo(checkpoint, tmp_path, progress=progress)
    assert told[0] == "measuring the position bias"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["answers", "calibration.json", "profile.json"]
    PositionBias.load(tmp_path / "profile.json")


@pytest.mark.slow
def test_interrupted_demo_goes_on_with_the_same_result(
    checkpoint: Path, tmp_path: Path, result: DemoResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def progress(what: str, share: float) -> None:
        if "Random" in what and not early:
            raise KeyboardInterrupt("Stopped.")

    monkeypatch.setattr(demo, "FIRST", 4)
    early: list[int] = []
    with pytest.raises(KeyboardInterrupt, match="goes on from there"):
        run_demo(checkpoint, tmp_path, progress=progress)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "answers").iterdir()}
    assert len(kept) == 4  # unpruned and three forms of FastV, on the first batch

    again = run_demo(checkpoint, tmp_path, shown=lambda records: early.append(records[0]["n"]))
    assert early == [4]
    assert all((tmp_path / "answers" / name).read_bytes() == kept[name] for name in kept)
    assert again.calibration == result.calibration
    for whole, parts in zip(result.outcomes, again.outcomes, strict=True):
        if whole.method != "Random":  # which draws anew for every part
            assert parts.answers == whole.answers


@pytest.mark.usefixtures("result")
def test_progress_comes_to_its_end(shares: list[float]) -> None:
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert shares[-2] == pytest.approx(1.0, abs=0.02)
