"""Commands, the demo and the survey skip samples that cannot be asked, and say so."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import pore
from helpers.calibrations import make_samples
from helpers.checkpoint import save_checkpoint
from pore.cli.app import app
from pore.data.loading import load_model
from pore.data.samples import Sample
from pore.data.sources import load_samples
from pore.engine.pruner import Pruner
from pore.errors import InputError
from pore.evaluation import demo, own, survey
from pore.evaluation.files import read_records
from pore.evaluation.findings import facts, skips
from pore.evaluation.results import About, DemoSettings, SurveyResult, SurveySettings


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = []
    for i, sample in enumerate(make_samples(8)):
        sample.load_image().save(tmp_path / f"{i}.png")
        lines.append({"image": f"{i}.png", "question": sample.question, "answer": "w6"})
    (tmp_path / "[red]bad.jpg").write_bytes(b"\xff\xd8 broken")
    lines.append({"image": "[red]bad.jpg", "question": "w6", "answer": "w6", "id": "[b]last"})
    path = tmp_path / "s.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def command(*arguments: Any, code: int = 0) -> str:
    found = CliRunner().invoke(app, list(map(str, arguments)))
    assert found.exit_code == code, found.output
    return " ".join(found.output.split())


def test_evaluate_skips_it_and_says_so(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common_part = ("evaluate", "-m", checkpoint, "-s", data, "--max-new-tokens", 1, "-b", 2)
    text = command(*common_part, "--keep", 4, "--reweight", "rope", "-o", out)
    assert "1 of 9 samples are bad and were left out for every method: [b]last (The image" in text
    records = read_records(out / "results.json")
    assert [record["n"] for record in records] == [8, 8, 8]
    assert all([one["id"] for one in record["skipped"]] == ["[b]last"] for record in records)
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [row["skipped"] for row in rows] == ["1", "1", "1"]
    text = command(*common_part, "--max-bad", 0, "-o", tmp_path / "none", code=1)
    assert "1 of 9 samples are bad" in text
    assert "raise --max-bad" in text
    assert not (tmp_path / "none").exists()


def test_what_was_asked_is_kept_when_a_later_method_fails(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise InputError("not today")

    monkeypatch.setattr(pore.Random, "_select", fails)
    out = tmp_path / "out"
    text = command(
        *("evaluate", "-m", checkpoint, "-s", data, "--method", "Random", "--keep", 4),
        *("--max-new-tokens", 1, "-o", out),
        code=1,
    )
    assert "not today" in text
    assert [record["method"] for record in read_records(out / "results.json")] == ["unpruned"]


def test_generate_says_what_is_wrong(checkpoint: Path, data: Path) -> None:
    text = command("generate", data.parent / "[red]bad.jpg", "w6", "-m", checkpoint, code=1)
    assert "[red]bad.jpg" in text
    assert "cannot be read" in text


ABOUT = About("m", "pore", "cal", "test", {})
LINE = "1 of 9 samples are bad and were left out for every method: test-0 (The image"


def broken(samples: list[Sample], place: int) -> list[Sample]:
    return [replace(s, image=b"x") if i == place else s for i, s in enumerate(samples)]


@pytest.mark.slow
def test_demo_skips_it_and_says_so(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = load_model(str(checkpoint))
    result = demo.run(
        model,
        processor,
        calibration=broken(list(load_samples("embedded:calibration", limit=6)), 3),
        test=broken(list(load_samples("embedded:test", limit=9)), 0),
        out=tmp_path,
        settings=DemoSettings(keeps=(0.25,), batch_size=4, max_bad=0.2),
        about=ABOUT,
    )
    assert [record["n"] for record in result.records] == [8] * 6
    assert result.calibration.count == 5
    assert LINE in result.report.read_text()
    assert LINE in " ".join(facts(result))
    assert all(len(d.first.answers) == 8 for d in result.differences)
    asked = [sample.kind for sample in load_samples("embedded:test", limit=9)][1:]
    assert len([e for e in result.examples if "of kind" in e.title]) == len(set(asked))


@pytest.mark.slow
def test_survey_skips_it_and_goes_on(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {name: pore.methods()[name] for name in ("FastV", "FasterVLM", "SGL")}
    monkeypatch.setattr(Pruner, "registry", some)
    model, processor = load_model(str(checkpoint))
    samples = list(load_samples("embedded:test", limit=9))

    def go(max_bad: float = 0.2, place: int = 0) -> SurveyResult:
        return survey.run(
            model,
            processor,
            calibration=broken(list(load_samples("embedded:calibration", limit=6)), 3),
            test=broken(samples, place),
            out=tmp_path,
            settings=SurveySettings(
                keeps=(4,), batch_size=4, max_new_tokens=2, timing=False, max_bad=max_bad
            ),
            about=ABOUT,
        )

    result = go()
    assert [record["n"] for record in result.records] == [8] * 6
    assert result.left_out == ()
    assert LINE in result.report.read_text()
    assert LINE in skips(read_records(tmp_path / "results.json"))[0]
    monkeypatch.setattr(own, "evaluate", lambda *_, **__: pytest.fail("it was asked before"))
    again = go()
    assert [o.answers for o in again.outcomes] == [o.answers for o in result.outcomes]
    assert [o.skipped for o in again.outcomes] == [o.skipped for o in result.outcomes]
    with pytest.raises(InputError, match="1 of 9 samples are bad"):
        go(max_bad=0)
