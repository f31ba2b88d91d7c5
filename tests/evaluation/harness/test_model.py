"""The model in lmms-eval: registered, equal to an evaluation of one's own, and cached safely."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pore
from helpers.benchmarks import few_questions
from pore.data.loading import load_model
from pore.data.sources import from_scenes
from pore.errors import InputError
from pore.evaluation.harness import TASKS
from pore.evaluation.running import evaluate
from pore.methods.making import make

pytest.importorskip("lmms_eval", reason="needs lmms-eval, which .ci/harness installs")

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager

from pore.evaluation.harness.model import PoreHF

QUESTIONS = 13


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load_model("embedded", device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded task with a few questions alone."""
    made = tmp_path_factory.mktemp("tasks")
    few_questions(made, QUESTIONS)
    return made


@pytest.fixture(scope="module")
def tasks(folder: Path) -> TaskManager:
    return TaskManager(include_path=[str(folder), str(TASKS)], include_defaults=False)


def test_the_tasks_are_found(tasks: TaskManager) -> None:
    assert {"few", "pore_embedded"} <= set(tasks.all_tasks)


def run(lm: PoreHF, tasks: TaskManager, **more: Any) -> dict[str, Any]:
    found = simple_evaluate(lm, tasks=["few"], task_manager=tasks, bootstrap_iters=0, **more)
    results: dict[str, Any] = found["results"]["few"]
    return results


@pytest.mark.parametrize("name", ["pore", "pore_hf"])
def test_it_is_found_by_its_names(name: str) -> None:
    assert get_model(name) is PoreHF


def test_as_in_an_evaluation_of_ones_own(embedded: Any, tasks: TaskManager, tmp_path: Path) -> None:
    samples = from_scenes("test", QUESTIONS)
    report = tmp_path / "report.json"
    lm = PoreHF(model=embedded[0], processor=embedded[1], batch_size=4, report=str(report))
    for pruner in (None, pore.FastV(keep=36)):
        lm.pruner = pruner
        found = run(lm, tasks)
        outcome = evaluate(*embedded, samples, pruner)
        assert found["accuracy,none"] == pytest.approx(outcome.accuracy)
        for third, accuracy in outcome.record()["accuracy_by_third"].items():
            assert found[f"accuracy_{third},none"] == pytest.approx(accuracy)
        written = json.loads(report.read_text())
        means = written["tasks"]["few"]
        assert means["prompts"] == len(written["prompts"]) == len(lm.asked) == QUESTIONS
        assert means["flops"] == pytest.approx(outcome.flops)
        assert means["visual_tokens_left"] == outcome.tokens_after
        assert (written["method"] is None) == (pruner is None)
        assert {"lmms-eval", "datasets", "torch"} <= written["versions"].keys()
        assert {"commit", "hardware"} <= written.keys()


def test_answers_are_cached_by_method(embedded: Any, tasks: TaskManager, tmp_path: Path) -> None:
    lm = PoreHF(model=embedded[0], processor=embedded[1], pruner=pore.FastV(keep=36), batch_size=8)
    asked = []
    for pruner in (pore.FastV(keep=36), pore.FastV(keep=36), pore.FastV(keep=72)):
        lm.pruner = pruner
        run(lm, tasks, use_cache=str(tmp_path))
        asked.append(len(lm.asked))
    assert asked == [QUESTIONS, 0, QUESTIONS]


def test_settings_beside_a_loaded_model_are_refused(embedded: Any) -> None:
    with pytest.raises(InputError, match="keep: a model that is loaded already"):
        PoreHF(model=embedded[0], processor=embedded[1], keep=36)


def test_a_model_of_the_command_line_lasts_for_one_evaluation() -> None:
    lm = PoreHF.create_from_arg_string(
        "pretrained=embedded,method=hiprune,keep=25%,alpha=0.2",
        {"batch_size": "2", "device": "cpu"},
    )
    assert lm.pruner == make("hiprune", lm.asker.model, 0.25, texts=["alpha=0.2"])
    assert lm.batch_size == 2
    lm.clean()
    with pytest.raises(InputError, match="made for one evaluation"):
        _ = lm.pruner


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ("method=fastv,keep=36,layer=2,reweight=rope", 36),
        ("method=fastv,keep=36,layer=1,reweight=without-rope,normalize=visual", 36),
        ("method=sparsevlm,keep=25%,reweight=null-token", 36),
        ("method=sgl,keep=36,layer=3", 36),
        ("method=sgl,keep=36,layer=3,guide=embedded", 36),
        ("method=visionzip,keep=36", 36),
        ("method=random,keep=36,seed=3,revision=main", 36),
    ],
)
def test_methods_by_their_settings(tasks: TaskManager, settings: str, left: int) -> None:
    given = {"batch_size": "8", "device": "cpu"}
    lm = PoreHF.create_from_arg_string(f"pretrained=embedded,{settings}", given)
    run(lm, tasks)
    assert {one.visual_tokens_left for one in lm.asked} == {left}
