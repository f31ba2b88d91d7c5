"""The true scorers of the ten benchmarks, under both protocols, on made documents."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pore
from helpers.benchmarks import NOT_SAID, answered, made, own, plain_model, png, write_tasks
from pore.data.loading import load_model
from pore.errors import InputError
from pore.evaluation.harness import TASKS
from pore.evaluation.harness.benchmarks import BENCHMARKS, OTHERS

pytest.importorskip("lmms_eval", reason="needs lmms-eval, which .ci/harness installs")

import lmms_eval
from lmms_eval import llm_judge
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config

from pore.evaluation.harness import sweep
from pore.evaluation.harness.model import PoreHF
from pore.evaluation.harness.sweep import HarnessBenchmark, Tasks

(MMVET,) = (one for one in BENCHMARKS if one.task == "mmvet")

STOCK = Path(lmms_eval.__file__).parent / "tasks"

# Data set, YAML file and split of every task; MM-Vet's own needs a judge.
HARNESS = {
    "vqav2_val": ("vqav2", STOCK / "vqav2/vqav2_val.yaml", "validation"),
    "vqav2_test": ("vqav2", STOCK / "vqav2/vqav2_test.yaml", "test"),
    "gqa": ("gqa", STOCK / "gqa/gqa.yaml", "testdev"),
    "vizwiz_vqa_val": ("vizwiz", STOCK / "vizwiz_vqa/vizwiz_vqa_val.yaml", "val"),
    "vizwiz_vqa_test": ("vizwiz", STOCK / "vizwiz_vqa/vizwiz_vqa_test.yaml", "test"),
    "scienceqa_img": ("sqa", STOCK / "scienceqa/scienceqa_img.yaml", "test"),
    "textvqa_val": ("textvqa", STOCK / "textvqa/textvqa_val.yaml", "validation"),
    "pope": ("pope", STOCK / "pope/pope.yaml", "test"),
    "mme": ("mme", STOCK / "mme/mme.yaml", "test"),
    "mmbench_en_dev_static": ("mmbench", STOCK / "mmbench/mmbench_en_dev_static.yaml", "dev"),
    "mmbench_cn_dev": ("mmbench", STOCK / "mmbench/mmbench_cn_dev.yaml", "dev"),
}
LLAVA = {
    "llava_vqav2_val": ("vqav2", own("llava_vqav2_val"), "validation"),
    "llava_vqav2_testdev": ("vqav2", own("llava_vqav2_testdev"), "testdev"),
    "llava_gqa": ("gqa", own("llava_gqa"), "testdev"),
    "llava_vizwiz_val": ("vizwiz", own("llava_vizwiz_val"), "val"),
    "llava_vizwiz_test": ("vizwiz", own("llava_vizwiz_test"), "test"),
    "llava_sqa_img": ("sqa", own("llava_sqa_img"), "test"),
    "llava_textvqa": ("textvqa", own("llava_textvqa"), "validation"),
    "llava_pope": ("pope", own("llava_pope"), "test"),
    "llava_mme": ("mme", own("llava_mme"), "test"),
    "llava_mmbench": ("mmbench", own("llava_mmbench"), "dev"),
    "llava_mmbench_cn": ("mmbench", own("llava_mmbench_cn"), "dev"),
    "llava_mmvet": ("mmvet", own("llava_mmvet"), "test"),
}
ALL = {**HARNESS, **LLAVA}

# By hand: what the made documents are worth to a model that is right about all pictures. Of POPE's
# splits one has no wrong label, the others one of four.
VQA = {"exact_match": (0 + 0.6 + 4) / 6}
MME = {"mme_perception_score": (50 + 200) / 2, "mme_cognition_score": 200.0}
WORTH = {
    "vqav2_val": VQA,
    "gqa": {"exact_match": 5 / 6},
    "vizwiz_vqa_val": VQA,
    "scienceqa_img": {"exact_match": 3 / 4},
    "textvqa_val": VQA,
    "pope": {"pope_accuracy": 10 / 12},
    "mme": MME,
    "mmbench_en_dev_static": {"gpt_eval_score": 200 / 3},
    "mmbench_cn_dev": {"gpt_eval_score": 200 / 3},
    "llava_vqav2_val": VQA,
    "llava_gqa": {"exact_match": 5 / 6},
    "llava_vizwiz_val": VQA,
    "llava_sqa_img": {"exact_match": 3 / 4},
    "llava_textvqa": VQA,
    "llava_pope": {"pope_accuracy": 10 / 12},
    "llava_mme": MME,
    "llava_mmbench": {"accuracy": 200 / 3},
    "llava_mmbench_cn": {"accuracy": 200 / 3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_model(tmp_path_factory.mktemp("model") / "plain")


@pytest.fixture(scope="module")
def docs(model: Path) -> dict[str, Any]:
    return made(answered(model))


@pytest.fixture(scope="module")
def folder(docs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tasks")
    write_tasks(found, docs, ALL)
    return found


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where lmms-eval writes the files for servers and judges."""
    return tmp_path_factory.mktemp("out")


def scores(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The metrics of every task, without standard errors."""
    return {
        task.removeprefix("made_"): {
            name.removesuffix(",none"): value
            for name, value in found.items()
            if name.endswith(",none") and "stderr" not in name and isinstance(value, (int, float))
        }
        for task, found in results.items()
    }


def run(model: Path, folder: Path, out: Path, settings: str) -> dict[str, dict[str, float]]:
    tasks = TaskManager(include_path=[str(folder)], include_defaults=False)
    given = {"batch_size": "4", "device": "cpu"}
    lm = PoreHF.create_from_arg_string(f"pretrained={model}{settings}", given)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        names = [f"made_{task}" for task in ALL]
        found = simple_evaluate(lm, tasks=names, task_manager=tasks, bootstrap_iters=0)
    return scores(found["results"])


@pytest.fixture(scope="module")
def unpruned(model: Path, folder: Path, out: Path) -> dict[str, dict[str, float]]:
    return run(model, folder, out, "")


@pytest.mark.parametrize("task", WORTH)
def test_scores_are_those_by_hand(unpruned: dict[str, dict[str, float]], task: str) -> None:
    for metric, worth in WORTH[task].items():
        assert unpruned[task][metric] == pytest.approx(worth), metric


@pytest.mark.parametrize("task", WORTH)
def test_every_score_has_an_interval(
    task: str,
    model: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = {f"made_{one.task}": one for one in BENCHMARKS}
    monkeypatch.setattr(sweep, "KNOWN", known)
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # its scorer asks nobody where letters are clear
    monkeypatch.chdir(tmp_path)
    loaded, processor = load_model(str(model), device="cpu")
    lm = PoreHF(model=loaded, processor=processor, batch_size=4)
    name = f"made_{task}"
    benchmark = HarnessBenchmark(name, Tasks([name], folder), lm, tmp_path, limit=None, seed=0)
    cell = benchmark.ask(None, lambda _: None, ("unpruned", None, None))
    assert not capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} <= {"answers", name}
    worth = WORTH[task].get(cell.metric)
    if worth is not None:
        assert cell.value == pytest.approx(worth * known[name].scale)
    assert cell.ci is not None
    assert cell.ci[0] <= cell.value <= cell.ci[1]
    assert cell.ci[0] < cell.ci[1]


def test_a_scorer_that_adds_up_is_not_taken_at_its_word(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lmms-eval's ocrbench adds the scores of all evaluations of a process."""
    right = [one for one in answered(model) if one.kind == "color"][:4]
    docs = [
        {
            "image": png(one),
            "question": one.question,
            "answer": [one.answer if i else NOT_SAID],
            "question_type": "Scene Text-centric VQA",
            "dataset": "made",
        }
        for i, one in enumerate(right)
    ]
    yaml = STOCK / "ocrbench/ocrbench.yaml"
    (name,) = write_tasks(tmp_path, {"ocr": docs}, {"ocrbench": ("ocr", yaml, "test")})
    (ocrbench,) = (one for one in OTHERS if one.task == "ocrbench")
    monkeypatch.setattr(sweep, "KNOWN", {name: ocrbench})
    monkeypatch.chdir(tmp_path)
    loaded, processor = load_model(str(model), device="cpu")
    lm = PoreHF(model=loaded, processor=processor, batch_size=4)
    benchmark = HarnessBenchmark(name, Tasks([name], tmp_path), lm, tmp_path, limit=None, seed=0)
    for pruner in (None, pore.FastV(keep=143)):
        cell = benchmark.ask(pruner, lambda _: None, ("x", None, None))
        assert cell.value == 75.0
        assert cell.ci is not None


def test_f1_of_pope(unpruned: dict[str, dict[str, float]], docs: dict[str, Any]) -> None:
    """Over all questions in lmms-eval's task, the mean over splits in LLaVA's."""
    wrong = {0, 5}
    pairs = [
        (doc["category"], doc["answer"] == "yes", (doc["answer"] == "yes") != (i in wrong))
        for i, doc in enumerate(docs["pope"])
    ]

    def f1(own: list[tuple[str, bool, bool]]) -> float:
        hits = sum(label and said for _, label, said in own)
        return 2 * hits / sum(label + said for _, label, said in own)

    splits = [
        [one for one in pairs if one[0] == name] for name in ("random", "popular", "adversarial")
    ]
    mean = sum(map(f1, splits)) / 3
    assert unpruned["pope"]["pope_f1_score"] == pytest.approx(f1(pairs))
    assert unpruned["llava_pope"]["pope_f1_score"] == pytest.approx(mean)
    assert abs(mean - f1(pairs)) > 0.001


def test_files_for_servers_and_judges(
    unpruned: dict[str, dict[str, float]], docs: dict[str, Any], out: Path
) -> None:
    written = {path.name: path for path in (out / "submissions").iterdir()}
    judged = json.loads(written["llava_mmvet.json"].read_text())
    assert judged == {doc["question_id"]: doc["answer"] for doc in docs["mmvet"]}
    vqav2 = [path for name, path in written.items() if name.startswith("vqav2-test")]
    expected = {(doc["question_id"], doc["answer"]) for doc in docs["vqav2"]}
    assert vqav2
    for path in vqav2:
        assert {(x["question_id"], x["answer"]) for x in json.loads(path.read_text())} == expected
    assert any(name.startswith("vizwiz_vqa-test") for name in written)


def test_two_processes(model: Path, folder: Path, out: Path, tmp_path: Path) -> None:
    """Of one task the documents are odd in number: one process gets a copy that must not count."""
    settings = ",method=fastv,keep=36,report="
    alone = run(model, folder, out, f"{settings}{tmp_path / 'alone.json'}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command += ["2", "-m", "lmms_eval", "--model", "pore", "--include_path", str(folder)]
    command += ["--model_args", f"pretrained={model}{settings}{tmp_path / 'report.json'}"]
    command += ["--tasks", ",".join(f"made_{task}" for task in ALL), "--output_path", str(tmp_path)]
    command += ["--batch_size", "4", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    written = list(tmp_path.glob("*plain/*_results.json"))
    assert len(written) == 1, done.stdout + done.stderr  # lmms-eval prints errors and exits with 0
    found = json.loads(written[0].read_text())
    together = scores(found["results"])
    assert together.keys() == alone.keys() == ALL.keys()
    for task, metrics in alone.items():
        assert together[task] == pytest.approx(metrics), task
    assert found["throughput"]["avg_visual_tokens_left"] == 36
    reports = [json.loads((tmp_path / name).read_text()) for name in ("alone.json", "report.json")]
    machines = [report.pop("checksum") and report.pop("hardware") for report in reports]
    assert [machine.get("processes", 1) for machine in machines] == [1, 2]
    assert reports[0] == reports[1]
    assert reports[0]["tasks"].keys() == {f"made_{task}" for task in ALL}
    assert reports[0]["tasks"]["made_llava_mmvet"]["prompts"] == 3


def test_the_protocol_asks_as_llava_does(docs: dict[str, Any]) -> None:
    """TextVQA's question as published (ShawnTan86/TokenCarve, issue 2)."""
    config = load_yaml_config(str(own("llava_textvqa")))
    doc = {
        "image": None,
        "question": "what is the brand of this camera?",
        "ocr_tokens": ["DAKOTA", "DIGITAL"],
    }
    asked = config["doc_to_text"](doc, config["lmms_eval_specific_kwargs"]["default"])
    assert asked == (
        "What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL\n"
        "Answer the question using a single word or phrase."
    )


def test_data_sets_are_those_of_lmms_eval() -> None:
    pairs = {
        "llava_vqav2_val": "vqav2_val",
        "llava_vqav2_testdev": "vqav2_test",
        "llava_gqa": "gqa",
        "llava_vizwiz_val": "vizwiz_vqa_val",
        "llava_vizwiz_test": "vizwiz_vqa_test",
        "llava_sqa_img": "scienceqa_img",
        "llava_textvqa": "textvqa_val",
        "llava_pope": "pope",
        "llava_mme": "mme",
        "llava_mmbench": "mmbench_en_dev_static",
        "llava_mmbench_cn": "mmbench_cn_dev",
    }
    for mine, theirs in pairs.items():
        ours, stock = (load_yaml_config(str(ALL[task][1])) for task in (mine, theirs))
        assert ours["dataset_path"] == stock["dataset_path"], mine
        assert ours.get("dataset_name") == stock.get("dataset_name"), mine
        if mine != "llava_vqav2_testdev":
            assert ours["test_split"] == stock["test_split"], mine


def test_lmms_eval_knows_the_tasks_of_the_table() -> None:
    tasks = TaskManager(include_path=[str(TASKS)])
    assert {one.task for one in BENCHMARKS} <= set(tasks.all_tasks)
    assert "llava_protocol" in tasks.all_groups


def test_the_scorer_of_mm_vet(
    model: Path,
    docs: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """lmms-eval's own, with another judge in GPT-4's place; that it needs one is told first."""
    asked = []

    class Judge:
        def evaluate(self, request: Any) -> Any:
            asked.append(request.messages[0]["content"].rsplit("\n", 1)[1])
            return SimpleNamespace(content="0.5" if len(asked) == 1 else "1.0", model_used="made")

    monkeypatch.setattr(llm_judge, "get_server", lambda **_: Judge())
    (task,) = write_tasks(tmp_path, docs, {"mmvet": ("mmvet", STOCK / "mmvet/mmvet.yaml", "test")})
    tasks = TaskManager(include_path=[str(tmp_path)], include_defaults=False)
    lm = PoreHF.create_from_arg_string(f"pretrained={model}", {"batch_size": "2", "device": "cpu"})
    monkeypatch.setattr(
        "pore.evaluation.harness.benchmarks.BENCHMARKS", (replace(MMVET, task=task),)
    )
    found = simple_evaluate(lm, tasks=[task], task_manager=tasks, bootstrap_iters=0)
    assert scores(found["results"]) == {"mmvet": {"gpt_eval_score": pytest.approx(250 / 3)}}
    assert sorted(asked) == sorted(
        f"{doc['question']} | {doc['answer']} | {doc['answer']} |" for doc in docs["mmvet"]
    )
    assert "made_mmvet (MM-Vet) is scored by a paid judge" in caplog.text


def test_a_video_is_refused(model: Path) -> None:
    given = {"batch_size": "1", "device": "cpu"}
    lm = PoreHF.create_from_arg_string(f"pretrained={model}", given)
    lm.task_dict = {"films": {"test": [{}]}}

    said = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    request = Instance(
        request_type="generate_until",
        arguments=("", lambda _: said, {}, 0, "films", "test"),
        idx=0,
        metadata={"task": "films", "doc_id": 0, "repeats": 1},
    )
    with pytest.raises(InputError, match="films, document 0 asks about a video"):
        lm.generate_until([request])
