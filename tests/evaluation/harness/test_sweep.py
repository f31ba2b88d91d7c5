"""Sweeps over tasks of lmms-eval: equal to one's own evaluation, and killed at any point."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import pore
from helpers.benchmarks import few_questions
from helpers.command_line import run
from pore.data import loading
from pore.data.loading import load_model
from pore.data.sources import from_scenes
from pore.errors import InputError
from pore.evaluation.files import read_results
from pore.evaluation.published_tables import TABLES
from pore.evaluation.running import evaluate
from pore.evaluation.sweeping import sweep
from pore.evaluation.wanted import Setting

pytest.importorskip("lmms_eval", reason="needs lmms-eval, which .ci/harness installs")

from pore.evaluation.harness import sweep as harness
from pore.evaluation.harness.model import PoreHF
from pore.evaluation.harness.sweep import HarnessBenchmark, Tasks, headline, score_of

QUESTIONS = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded task with a few questions alone, and a group of it."""
    made = tmp_path_factory.mktemp("tasks")
    few_questions(made, QUESTIONS)
    (made / "some.yaml").write_text("group: some\ntask:\n  - few\n  - pore_embedded\n")
    return made


def test_tasks_by_name(folder: Path) -> None:
    assert Tasks(["some", "few"], folder).names == ("few", "pore_embedded")
    with pytest.raises(InputError, match="no task nothing"):
        Tasks(["nothing"], folder)


def test_tasks_are_looked_up_before_a_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("it was loaded"))
    given = ("evaluate", "--methods", "fastv", "--include-path", folder)
    found = run(*given, "--tasks", "samples,few,nothing", code=1)
    assert "lmms-eval has no task nothing" in found.stderr


def test_as_in_an_evaluation_of_ones_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load_model("embedded", device="cpu")
    lm = PoreHF(model=model, processor=processor, batch_size=4)
    plan = [Setting(None, None, None), Setting(36, None, pore.FastV(keep=36))]

    def run() -> Any:
        few = HarnessBenchmark("few", Tasks(["few"], folder), lm, tmp_path, limit=None, seed=0)
        return sweep([few], plan, tmp_path, circumstances={})

    found = run()
    samples = from_scenes("test", QUESTIONS)
    for row, setting in zip(found.rows, plan, strict=True):
        outcome = evaluate(model, processor, samples, setting.pruner)
        cell = row.cells["few"]
        assert (cell.metric, cell.value) == ("accuracy", pytest.approx(100 * outcome.accuracy))
        assert cell.ci == pytest.approx([100 * end for end in outcome.ci])
        assert cell.outcome.right == outcome.right
        assert cell.outcome.flops == pytest.approx(outcome.flops)
        assert cell.outcome.tokens_after == outcome.tokens_after
        assert cell.outcome.record()["accuracy_by_third"] == outcome.record()["accuracy_by_third"]
    results = read_results(tmp_path / "few" / "results.json")
    assert [record["keep"] for record in results.records] == [1.0, 36]
    monkeypatch.setattr(harness, "simple_evaluate", lambda *_, **__: pytest.fail("asked again"))
    assert run() == found


def test_the_tasks_of_published_tables_are_found_and_others_refused() -> None:
    for table in TABLES.values():
        assert Tasks(table.tasks.values()).names == tuple(table.tasks.values())
    with pytest.raises(InputError, match=r"llava_mmvet \(MM-Vet\) is scored by a paid judge"):
        Tasks(["llava_mmvet"])


def test_what_a_task_measures() -> None:
    config = {"task": "x", "metric_list": [{"metric": "submission"}, {"metric": "exact_match"}]}
    results = {"alias": "x", "submission,none": None, "exact_match,none": 0.5}
    assert headline(results, config) == ("exact_match", 0.5)
    assert headline({"a,none": 1, "b,none": 2}, config, "b") == ("b", 2.0)
    with pytest.raises(InputError, match="gives no score here"):
        headline({"submission,none": None}, config)
    assert [score_of(one) for one in (0.3, True, {"score": 1}, {"a": 1}, None, "x")] == [
        *(0.3, 1.0, 1.0),
        *(None, None, None),
    ]


_KILLED = """
import os, signal
from pore.cli.app import main
from pore.evaluation.harness.model import PoreHF

answers, left = PoreHF._answers, 2


def killed(*args):
    global left
    left -= 1
    if left == 0 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return answers(*args)


PoreHF._answers = killed
main()
"""


def test_killed_in_the_middle_and_resumed_to_the_same_table(folder: Path, tmp_path: Path) -> None:
    """In one process, in two of which one is killed, and by two: the table of one process."""
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    def command(out: Path, *start: str) -> list[str]:
        given = ["--tasks", "samples,few", "--methods", "fastv,random", "--keep", "36,16"]
        more = ["--limit", str(QUESTIONS), "--include-path", str(folder), "-o", str(out)]
        start = start or ("-m", "pore")
        return [sys.executable, *start, "evaluate", "--device", "cpu", *given, *more]

    def kept(out: Path) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (out / "answers").glob("*.json")}

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command(whole), check=True, capture_output=True)
    assert len(kept(whole)) == 2 * 5
    running = subprocess.Popen(command(cut), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and len(kept(cut)) < 3:
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert 3 <= len(kept(cut)) < 6
    stopped = subprocess.run(command(cut, *two, str(script)), capture_output=True)
    assert stopped.returncode != 0
    before = kept(cut)
    assert len(before) == 6  # one's own questions, and the first cell of lmms-eval's
    done = subprocess.run(command(cut, *two, "-m", "pore"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote ") == 1
    after = kept(cut)
    assert {name: after[name] for name in before} == before  # nothing was asked again
    for name in ("sweep.csv", "sweep.tex"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    rows = [json.loads((out / "sweep.json").read_text())["rows"] for out in (cut, whole)]
    assert rows[0] == rows[1]
