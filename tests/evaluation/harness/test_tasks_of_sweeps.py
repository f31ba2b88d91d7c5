"""Tasks of lmms-eval in a sweep: what defines them, who scores them, and what they fail with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pore
from helpers.benchmarks import few_questions
from helpers.command_line import run
from pore.data.loading import load_model
from pore.errors import InputError
from pore.evaluation.harness import TASKS
from pore.evaluation.sweeping import sweep
from pore.evaluation.wanted import Setting

pytest.importorskip("lmms_eval", reason="needs lmms-eval, which .ci/harness installs")

import lmms_eval

from pore.evaluation.harness import failures
from pore.evaluation.harness.definition import _files, definition
from pore.evaluation.harness.model import PoreHF
from pore.evaluation.harness.sweep import HarnessBenchmark, Tasks

SCORER = """
from helper import POINTS
from pore.evaluation.harness import scenes


def score(doc, results):
    return {"accuracy": POINTS if NEEDED in results[0] else 0}


def total(items, args):
    from lmms_eval.tasks._task_utils.file_utils import generate_submission_file

    print("a table of the scorer")
    with open(generate_submission_file("mine.json", args), "w") as file:
        file.write(str(len(items)))
    return sum(items) / len(items)
"""

TASK = """
include: base.yaml
task: own
process_results: !function scorer.score
metric_list:
  - metric: accuracy
    aggregation: !function scorer.total
    higher_is_better: true
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task with an included file, a scorer with a helper, and data, all in one folder."""
    made = tmp_path / "tasks"
    made.mkdir()
    few_questions(made, 3)
    (made / "few.yaml").rename(made / "base.yaml")
    (made / "base.yaml").write_text((made / "base.yaml").read_text().replace("task: few\n", ""))
    (made / "own.yaml").write_text(TASK)
    (made / "scorer.py").write_text("NEEDED = ''\n" + SCORER)
    (made / "helper.py").write_text("POINTS = 1\n")
    (made / "unrelated.py").write_text("")
    monkeypatch.syspath_prepend(str(made))
    return made


@pytest.fixture(scope="module")
def lm() -> PoreHF:
    model, processor = load_model("embedded", device="cpu")
    return PoreHF(model=model, processor=processor, batch_size=4)


# -- what defines a task --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["own.yaml", "base.yaml", "scorer.py", "helper.py", "scenes.json"])
def test_a_change_of_any_file_of_a_task_changes_its_definition(folder: Path, name: str) -> None:
    before = definition(folder / "own.yaml")
    (folder / "unrelated.py").write_text("1")
    assert definition(folder / "own.yaml") == before
    (folder / name).write_text((folder / name).read_text() + "\n")
    assert definition(folder / "own.yaml") != before


def test_data_in_folders_and_by_patterns(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "deep" / "a.parquet").write_bytes(b"a")
    for lines in (
        f"dataset_path: {data}\n",
        f"dataset_path: parquet\ndataset_kwargs: {{data_dir: {data}}}\n",
        f"dataset_path: parquet\ndataset_kwargs: {{data_files: ['{data}/**/*.parquet']}}\n",
        f"dataset_path: {data}\ndataset_kwargs: {{data_files: {{test: deep/a.parquet}}}}\n",
    ):
        (tmp_path / "task.yaml").write_text(lines)
        (data / "deep" / "a.parquet").write_bytes(b"a")
        before = definition(tmp_path / "task.yaml")
        (data / "deep" / "a.parquet").write_bytes(b"b")
        assert definition(tmp_path / "task.yaml") != before
    (tmp_path / "task.yaml").write_text("dataset_path: some/where-on-the-hub\n")
    assert definition(tmp_path / "task.yaml")


def test_modules_that_are_installed_define_tasks_too() -> None:
    names = [one.name for one in _files(TASKS / "embedded" / "pore_embedded.yaml")]
    assert names == ["pore_embedded.yaml", "scenes.py"]
    stock = Path(lmms_eval.__file__).parent / "tasks" / "mmbench" / "mmbench_en_dev_static.yaml"
    names = [one.name for one in _files(stock)]
    assert names[:2] == [stock.name, "_default_template_mmbench_en_yaml"]
    assert {"en_utils.py", "mmbench_evals.py", "file_utils.py"} <= {*names[2:]}


def test_another_scorer_asks_anew_and_files_go_into_the_folder(
    folder: Path, lm: PoreHF, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    plan = [Setting(None, None, None), Setting(36, None, pore.FastV(keep=36))]

    def values() -> list[float]:
        own = HarnessBenchmark("own", Tasks(["own"], folder), lm, out, limit=None, seed=0)
        found = sweep([own], plan, out, circumstances={})
        return [one.cells["own"].value for one in found.rows]

    assert values() == [100.0, 100.0]
    assert "a table of the scorer" not in capsys.readouterr().out
    kept = [path.stem for path in (out / "answers").iterdir()]
    written = list((out / "own").glob("*/submissions/mine.json"))
    assert sorted(path.parts[-3] for path in written) == sorted(kept)
    document = json.loads(next((out / "answers").iterdir()).read_text())
    assert {"lmms-eval", "datasets", "torch"} <= document["circumstances"]["versions"].keys()
    (folder / "scorer.py").write_text("NEEDED = 'no such answer'\n" + SCORER)
    assert values() == [0.0, 0.0]


# -- who scores a task ----------------------------------------------------------------------------

STOCK_TASKS = {
    "docvqa_test": "docvqa_test only writes a file for somebody else to score (submission)",
    "mmbench_en_test": "mmbench_en_test only writes",
    "mmbench_cn_dev": "without a key (OPENAI_API_KEY) takes one by chance; mmbench_en_dev_static,",
    "mmbench_en_dev": "takes one by chance",
    "mmbench_cn_cc": "takes one by chance",
    "mmvet": "mmvet (MM-Vet) is scored by a paid judge",
    "llava_mmvet": "llava_mmvet (MM-Vet) is scored by a paid judge",
    "vqav2_test": "vqav2_test (VQAv2) is scored by a submission server",
}


@pytest.mark.slow
def test_what_has_no_score_is_refused_and_what_has_a_judge_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("API_TYPE", raising=False)
    with pytest.raises(InputError) as told:
        Tasks([*STOCK_TASKS, "gqa", "llava_bench_coco"])
    for words in STOCK_TASKS.values():
        assert words in str(told.value)
    assert "gqa" not in str(told.value)
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    found = Tasks(["gqa", "mmbench_en_dev_static", "mmbench_en_dev", "mmbench_cn_dev", "ferret"])
    assert [line.split()[0] for line in found.warnings] == [
        *("mmbench_en_dev", "mmbench_cn_dev", "ferret")
    ]
    assert "gpt_eval_ferret_all" in found.warnings[-1]


@pytest.mark.parametrize("kind", ["loglikelihood", "multiple_choice", "generate_until_multi_round"])
def test_tasks_that_ask_for_something_else_are_refused(folder: Path, kind: str) -> None:
    (folder / "own.yaml").write_text(TASK + f"output_type: {kind}\n")
    with pytest.raises(InputError, match=f"own asks for {kind}"):
        Tasks(["own"], folder)


def test_folders_that_cannot_be_read_are_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        Tasks(["own"], tmp_path / "none")
    (folder / "own.yaml").write_text("include: nothing.yaml\ntask: own\n")
    with pytest.raises(InputError, match=r"lmms-eval cannot read the tasks in .*nothing\.yaml"):
        Tasks(["own"], folder)


# -- what fails -----------------------------------------------------------------------------------


def test_the_cause_is_told_in_its_own_words() -> None:
    class RetryError(Exception):
        pass

    def raised(*steps: Callable[[], BaseException]) -> BaseException:
        found: BaseException | None = None
        for step in steps:
            made = step()
            made.__cause__ = found
            found = made
        assert found is not None
        return found

    gated = raised(lambda: OSError("401"), lambda: ValueError("gated.\n  Ask"), RetryError)
    assert failures.cause(gated) == "ValueError: gated. Ask (OSError: 401)"
    assert failures.cause(KeyError()) == "KeyError"


@pytest.mark.parametrize("kind", ["data", "function", "scorer", "total"])
def test_a_task_that_fails_is_left_out_and_others_go_on(
    folder: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)  # it tries five times
    scorer = folder / "scorer.py"
    scorer.write_text("NEEDED = ''\n" + SCORER)
    if kind == "data":
        more = "dataset_path: json\ndataset_kwargs: {data_files: {test: gone.json}}\n"
        (folder / "own.yaml").write_text(TASK + more)
    elif kind == "function":
        (folder / "own.yaml").write_text(TASK.replace("scorer.score", "scorer.none"))
    elif kind == "scorer":
        scorer.write_text(SCORER)  # a name that is not defined
    else:
        scorer.write_text(("NEEDED = ''\n" + SCORER).replace("(items)", "(nothing)"))
    few_questions(folder, 3)
    given = ("evaluate", "--methods", "fastv", "--keep", "36", "--include-path", folder)
    given = (*given, "--device", "cpu", "-o", tmp_path / "out")
    found = run(*given, "--tasks", "own,few")
    text = " ".join(found.output.split())
    assert f"Left out: own: lmms-eval's task own cannot be {_verb(kind)}" in text
    assert {"data": "gone.json", "function": "none", "scorer": "NEEDED", "total": "nothing"}[
        kind
    ] in text
    document = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert document["benchmarks"] == ["few"]
    assert len(document["rows"]) == 2
    alone = run(*given, "--tasks", "own", code=1)
    assert "None of the benchmarks can be asked. own: lmms-eval's task own" in " ".join(
        alone.stderr.split()
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data", "total"])
def test_several_processes_end_too(folder: Path, kind: str, tmp_path: Path) -> None:
    """All leave a task out that cannot be loaded; a scorer that fails in one of them ends all."""
    if kind == "data":
        more = "dataset_path: json\ndataset_kwargs: {data_files: {test: gone.json}}\n"
        (folder / "own.yaml").write_text(TASK + more)
    else:
        (folder / "scorer.py").write_text(f"NEEDED = ''\n{SCORER.replace('(items)', '(none)')}")
    few_questions(folder, 3)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command += ["2", "-m", "pore", "evaluate", "--methods", "fastv", "--keep", "36", "--device"]
    command += ["cpu", "-o", str(tmp_path / "out"), "--include-path", str(folder)]
    command += ["--tasks", "own,few"]
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    here = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=here)
    if kind == "data":
        assert done.returncode == 0, done.stderr
        assert "Left out: own: lmms-eval's task own cannot be loaded" in done.stdout
        page = (tmp_path / "out" / "sweep.html").read_text()
        assert "processes</th><td>2</td>" in page
    else:
        assert done.returncode != 0
        assert "lmms-eval's task own cannot be put or scored" in done.stderr


def _verb(kind: str) -> str:
    return "loaded" if kind in ("data", "function") else "put or scored"


def test_errors_of_the_model_are_not_lmms_evals(
    folder: Path, lm: PoreHF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = HarnessBenchmark("own", Tasks(["own"], folder), lm, tmp_path, limit=None, seed=0)

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("pore.evaluation.harness.asking.prompt_inputs", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        own.ask(None, lambda _: None, ("unpruned", None, None))
