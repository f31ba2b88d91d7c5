"""Every answer is written as it is given; an interrupted run goes on with nothing asked twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

import pore
from helpers.survey import ABOUT
from pore._saved.seals import content
from pore.data.loading import load_model
from pore.data.samples import Sample
from pore.data.sources import load_samples
from pore.engine.pruner import Pruner
from pore.evaluation import comparing, own, survey
from pore.evaluation.files import read_records
from pore.evaluation.guided import Guiding
from pore.evaluation.metrics import METRICS
from pore.evaluation.own import OwnQuestions
from pore.evaluation.predictions import Predictions
from pore.evaluation.results import SurveySettings
from pore.evaluation.sweeping import OwnBenchmark, sweep
from pore.evaluation.wanted import Corrections, planned, read_wanted

SETTINGS = SurveySettings(keeps=(0.5, 4), batch_size=2, max_new_tokens=2, timing=False)

N = 7


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Any, Any]:
    return load_model(str(checkpoint))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """Which batch was asked under which setting."""
    found: list[tuple[Any, int]] = []
    ask = own.evaluate

    def noted(*args: Any, part: range, **more: Any) -> Any:
        outcome = ask(*args, part=part, **more)
        found.append((args[3], part.start))
        return outcome

    monkeypatch.setattr(own, "evaluate", noted)
    return found


def questions(limit: int = N) -> list[Sample]:
    made = list(load_samples("embedded:test", limit=limit))
    return [replace(one, image=b"x") if i == 3 else one for i, one in enumerate(made)]


def calibration() -> list[Sample]:
    return list(load_samples("embedded:calibration", limit=4))


def one_by_one(model: Any, processor: Any, out: Path) -> None:
    """As `pore evaluate --method` asks."""
    asking = OwnQuestions(
        model, processor, questions(), out, SETTINGS, predictions=Predictions(out)
    )
    for pruner in (None, pore.FastV(keep=4), pore.Random(keep=4), pore.FastV(keep=0.5)):
        asking.ask(pruner, lambda _: None)


def surveyed(model: Any, processor: Any, out: Path) -> None:
    """As `pore evaluate --all` asks."""
    given: dict[str, Any] = {"calibration": calibration(), "test": questions(), "about": ABOUT}
    survey.run(model, processor, out=out, settings=SETTINGS, **given)


def compared(model: Any, processor: Any, out: Path) -> None:
    """As `pore evaluate --corrections` asks."""
    comparing.run(
        model,
        processor,
        calibration=calibration(),
        test=questions(),
        out=out,
        settings=SETTINGS,
        source="cal",
        names=("distance", "without RoPE"),
    )


def swept(model: Any, processor: Any, out: Path) -> None:
    """As `pore evaluate --methods` asks."""
    corrections = Corrections(model, processor, calibration, "cal", out, SETTINGS, None)
    guiding = Guiding(model, processor, max_new_tokens=2, itself=True)
    wanted = read_wanted(["fastv", "fastv+without-rope", "random"])
    plan, _ = planned(model, wanted, SETTINGS, corrections, guiding)
    told = Predictions(out / "samples")
    asking = OwnQuestions(model, processor, questions(), out, SETTINGS, predictions=told)
    sweep([OwnBenchmark(asking)], plan, out, circumstances={})


KINDS = {"one": one_by_one, "all": surveyed, "corrections": compared, "methods": swept}


def lines(out: Path) -> list[dict[str, Any]]:
    (path,) = out.rglob("predictions.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(out: Path) -> dict[str, Any]:
    """What a run leaves, apart from pictures, pages and the date."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.suffix in (".jsonl", ".csv"):
            found[str(path.relative_to(out))] = path.read_text()
        elif path.suffix == ".json":
            document = json.loads(path.read_text())
            if isinstance(document, dict):
                document = content(document) | {"circumstances": None}
            found[str(path.relative_to(out))] = document
        else:
            assert path.suffix != ".batches", "a journal of a setting that is done"
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_interrupted_runs_go_on_to_the_same_files(
    kind: str,
    loaded: tuple[Any, Any],
    tmp_path: Path,
    asked: list[tuple[Any, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped after every third batch, with half a line written, as by a cut of the power."""
    some = {name: pore.methods()[name] for name in ("FastV", "Random", "Downsample")}
    monkeypatch.setattr(Pruner, "registry", some)
    if kind == "corrections":
        monkeypatch.setattr(comparing, "BLOCK", 4)
    go: Callable[..., None] = KINDS[kind]
    go(*loaded, tmp_path / "whole")
    whole = list(asked)
    asked.clear()
    ask, left = own.evaluate, [3]

    def stops(*args: Any, **more: Any) -> Any:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return ask(*args, **more)

    monkeypatch.setattr(own, "evaluate", stops)
    stopped = tmp_path / "stopped"
    for _ in range(len(whole)):
        try:
            go(*loaded, stopped)
            break
        except KeyboardInterrupt:
            left[0] = 3
            for path in stopped.rglob("*.batches"):
                with path.open("a") as file:
                    file.write('{"batch": 1, "ans')
    else:
        pytest.fail("it did not come to its end")
    assert files(stopped) == files(tmp_path / "whole")
    assert asked == whole  # no batch of any setting twice


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.at_once(1)
def test_every_question_of_every_setting_has_a_line(
    kind: str, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {name: pore.methods()[name] for name in ("FastV", "Random")}
    monkeypatch.setattr(Pruner, "registry", some)
    KINDS[kind](*loaded, tmp_path)
    found = lines(tmp_path)
    settings = {(line["method"], line["reweight"], line["keep"]) for line in found}
    assert ("unpruned", None, None) in settings
    assert len(settings) >= 4
    samples = questions()
    for setting in settings:
        own_lines = {
            line["id"]: line
            for line in found
            if (line["method"], line["reweight"], line["keep"]) == setting
        }
        assert own_lines.keys() == {sample.id for sample in samples}
        for i, sample in enumerate(samples):
            line = own_lines[sample.id]
            if i == 3:
                assert (line["prediction"], line["score"], line["right"]) == (None, None, None)
                assert "cannot be read" in line["skipped"]
                continue
            assert (line["question"], line["answers"]) == (sample.question, [sample.answer])
            assert line["score"] == line["right"] == (line["prediction"] == sample.answer)
    (path,) = tmp_path.rglob("predictions.jsonl")
    assert len(pd.read_json(path, lines=True)) == len(found)
    table = datasets.load_dataset("json", data_files=str(path), split="train")
    assert set(table.column_names) == set(found[0])
    records = [] if kind == "one" else read_records(path.with_name("results.json"))
    for record in records:
        mine = [
            line["score"]
            for line in found
            if (line["method"], line["reweight"]) == (record["method"], record["reweight"])
            and line["keep"] in (None, str(record["keep"]))
            and line["score"] is not None
        ]
        assert sum(mine) / len(mine) == record["accuracy"]


@pytest.mark.slow
def test_another_metric_scores_what_was_answered(
    loaded: tuple[Any, Any], tmp_path: Path, asked: list[tuple[Any, int]]
) -> None:
    """Neither another metric nor other right answers have the model asked again."""
    model, processor = loaded
    samples = list(load_samples("embedded:test", limit=4))

    def go(samples: list[Sample], name: str) -> Any:
        settings = replace(SETTINGS, metric=METRICS[name])
        asking = OwnQuestions(
            model, processor, samples, tmp_path, settings, predictions=Predictions(tmp_path)
        )
        return asking.ask(None, lambda _: None)

    first = go(samples, "exact")
    said = [answer.given for answer in first.answers]
    assert len(asked) == 2
    people = [replace(one, answers=(said[i],) * 2 + ("x",) * 8) for i, one in enumerate(samples)]
    second = go(people, "vqa")
    assert second.points == pytest.approx((0.6,) * 4)
    assert second.metric == "vqa"
    assert second.record()["ci"] == pytest.approx([0.6, 0.6])
    assert {line["metric"] for line in lines(tmp_path)} == {"vqa"}
    corrected = [replace(one, answer=said[i], answers=()) for i, one in enumerate(samples)]
    assert go(corrected, "exact").accuracy == 1
    assert len(asked) == 2


def test_without_a_folder_nothing_is_kept(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    asking = OwnQuestions(*loaded, questions(), None, SETTINGS)
    once, again = (asking.ask(pore.FastV(keep=4), lambda _: None) for _ in range(2))
    assert once.answers == again.answers == asking.so_far
    assert not list(tmp_path.iterdir())
