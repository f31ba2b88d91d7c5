"""`pore evaluate`, `pore demo` and `pore bench`, on a tiny checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

import pore
from helpers.checkpoint import save_checkpoint
from helpers.command_line import run
from helpers.pages import checked_page
from pore.errors import UnsupportedModelError
from pore.evaluation import own
from pore.evaluation.files import read_records
from pore.evaluation.records import FIELDS
from pore.methods.registry import methods


def test_evaluate_with_and_without_p(
    model: Path, data: Path, profile: Path, tmp_path: Path
) -> None:
    found = run(
        *("evaluate", "-m", model, "-s", data / "samples.jsonl", "--reweight", profile),
        *("--keep", "4", "--keep", "50%", "-o", tmp_path, "--max-new-tokens", "2"),
    )
    records = read_records(tmp_path / "results.json")
    assert [(r["method"], r["reweight"], r["keep"]) for r in records] == [
        ("unpruned", None, 1.0),
        ("FastV", None, 4),
        ("FastV", "exponential", 4),
        ("FastV", None, 0.5),
        ("FastV", "exponential", 0.5),
    ]
    assert all(record["prefill_ms"] > 0 and record["n"] == 6 for record in records)
    assert found.output.count("FastV + PoRe − FastV") == 2
    assert (tmp_path / "results.csv").read_text().startswith("method,reweight,keep,layer")
    page = checked_page((tmp_path / "report.html").read_text())
    assert "PoRe makes no clear difference at keep 4 and keep 50 %." in page.text
    assert f"and {tmp_path / 'report.html'}" in found.output.replace("\n", "")


def test_a_method_that_needs_p_runs_with_it_alone(model: Path, data: Path, profile: Path) -> None:
    common = ("-m", model, "--method", "d2pruner", "--keep", "4", "--max-new-tokens", "1")
    asked = ("evaluate", *common, "-s", data / "samples.jsonl")
    found = run(*asked, "--reweight", profile)
    assert "D2Pruner + PoRe" in found.output
    assert "− D2Pruner" not in found.output
    assert "for --reweight" in run(*asked, code=1).stderr
    one = ("generate", data / "0.png", "w6", *common)
    assert "16 -> 4" in run(*one, "--reweight", profile).output


def test_evaluate_all(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {name: methods()[name] for name in ("FastV", "FasterVLM", "Scored")}
    monkeypatch.setattr(pore.Pruner, "registry", some)
    common = ("evaluate", "--all", "-m", model, "--limit", "3", "--images", "4", "-o", tmp_path)
    found = run(*common, "--keep", "4", "--no-timing", "--max-new-tokens", "2")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"report.html", "results.json", "results.csv", "differences.json", "pore.png"} < names
    assert [r["method"] for r in read_records(tmp_path / "results.json")] == [
        *("unpruned", "FastV", "FastV", "FasterVLM")
    ]
    assert "FastV + PoRe" in found.output
    assert "Left out: Scored at 4" in found.output
    assert "--all takes every method" in run(*common, "--layer", "3", code=1).stderr


@pytest.mark.slow
def test_evaluate_corrections(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = {name: methods()[name] for name in ("FastV", "FasterVLM")}
    monkeypatch.setattr(pore.Pruner, "registry", some)
    common = ("evaluate", "--corrections", "-m", model, "--limit", "3", "--images", "4")
    common = (*common, "--no-timing", "--max-new-tokens", "2", "--keep", "4", "-o", tmp_path)
    found = run(*common)
    assert "spline, half strength" in found.output
    assert "FastV, keep 4" in found.output
    assert "FastV, keep 4, by third of the image" in found.output
    rules = [line for line in found.output.splitlines() if "──" in line]
    assert max(map(len, rules)) <= 80
    assert "3 questions were asked under every setting" in found.output
    checked_page((tmp_path / "report.html").read_text())
    assert {"FastV", "unpruned"} == {
        record["method"] for record in read_records(tmp_path / "results.json")
    }
    assert "two jobs" in run(*common, "--all", code=1).stderr
    assert "--corrections takes every method" in run(*common, "--layer", "3", code=1).stderr
    assert "not --average" in run(*common, "--average", code=1).stderr


@pytest.mark.slow
def test_evaluate_all_with_a_model_that_guides(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pore.Pruner, "registry", {"SGL": methods()["SGL"]})
    common = ("evaluate", "--all", "-m", model, "--limit", "3", "--images", "4", "--keep", "4")
    common = (*common, "--no-timing", "--max-new-tokens", "2")
    guide = save_checkpoint(tmp_path / "small")
    for given, name in (
        ((), "itself"),
        (("--guide", model), "itself"),
        (("--guide", guide), "small"),
    ):
        out = tmp_path / f"{len(given)}-{name}"
        found = run(*common, *given, "-o", out)
        guides = [record["guide"] for record in read_records(out / "results.json")]
        assert guides == [None, name, name]
        assert "SGL + PoRe §" in found.output
    nowhere = run(*common, "--guide", tmp_path / "none", "-o", tmp_path / "x", code=1)
    assert str(tmp_path / "none") in nowhere.stderr.replace("\n", "")
    assert not (tmp_path / "x").exists()
    alone = run("evaluate", "-m", model, "--guide", guide, code=1)
    assert "--guide is for --all" in alone.stderr


def test_models_of_unknown_sizes_are_pruned_all_the_same(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(_: object) -> None:
        raise UnsupportedModelError("sizes unknown")

    monkeypatch.setattr("pore.cost.decoders.DecoderShape.from_config", unknown)
    samples = data / "samples.jsonl"
    run("evaluate", "-m", model, "-s", samples, "--keep", "4", "--no-timing", "-o", tmp_path)
    records = read_records(tmp_path / "results.json")
    assert [(record["tokens_after"], record["flops"]) for record in records] == [
        (16, None),
        (4, None),
    ]


@pytest.mark.slow
def test_demo(model: Path, tmp_path: Path) -> None:
    found = run(
        *("demo", "-m", model, "--images", "4", "--questions", "3", "--keep", "25%"),
        *("-o", tmp_path, "-b", "3"),
    )
    assert len(read_records(tmp_path / "results.json")) == 6
    assert tuple(json.loads((tmp_path / "results.json").read_text())["results"][0]) == FIELDS
    assert "FastV + RoPE prior" in found.output
    assert "report.html" in found.output
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_bench_of_p_and_of_a_picture(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    quick = ("--keep", "4", "--repeats", "1", "--warmup", "0", "--new-tokens", "2", "-o", out)
    run("bench", "-m", model, "--image", "40x30", "--reweight", "rope", *quick)
    found = json.loads(out.read_text())
    assert found["workload"]["visual"] == 16
    names = [setting["name"] for setting in found["settings"]]
    assert names[1:] == ["FastV(keep=4, layer=2)", "FastV(keep=4, layer=2, reweight=rope)"]
    run("bench", "--shape", "llava-64x3", "--reweight", "without-rope", *quick)
    names = [setting["name"] for setting in json.loads(out.read_text())["settings"]]
    assert names[-1] == "FastV(keep=4, layer=2, reweight=without RoPE)"
    shape = ("bench", "--shape", "llava-64x3", *quick)
    run(*shape, "--reweight", "rope")
    assert "--image needs --model" in run(*shape, "--image", "40x30", code=2).stderr
    both = ("--image", "40x30", "--text-after", "3")
    assert "chat template" in run("bench", "-m", model, *both, code=2).stderr
    assert "not a width and a height" in run("bench", "-m", model, "--image", "40", code=2).stderr


def test_flops_of_a_picture(model: Path) -> None:
    alone = json.loads(run("flops", "-m", model, "--keep", "4", "--json").output)
    told = json.loads(run("flops", "-m", model, "--image", "99x40", "--keep", "4", "--json").output)
    assert told == alone  # its images have one size
    assert "--image needs --model" in run("flops", "--image", "9x9", code=2).stderr


def test_bench_of_a_checkpoint(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    run(
        *("bench", "-m", model, "--keep", "4", "--repeats", "1", "--warmup", "0"),
        *("--text-before", "3", "--text-after", "2", "--new-tokens", "2", "-o", out),
    )
    assert json.loads(out.read_text())


def test_evaluate_several_methods(model: Path, data: Path, profile: Path, tmp_path: Path) -> None:
    common = ("evaluate", "-m", model, "-s", data / "samples.jsonl", "-o", tmp_path)
    common = (*common, "--max-new-tokens", "2", "--methods", "fastv,pore")
    found = run(*common, "--keep", "8,4", "--reweight", profile)
    assert "FastV + PoRe" in found.output
    document = json.loads((tmp_path / "sweep.json").read_text())
    assert [(row["method"], row["reweight"], row["keep"]) for row in document["rows"]] == [
        ("unpruned", None, None),
        *((name, p, keep) for keep in (8, 4) for name, p in (("FastV", None), ("FastV", "pore"))),
    ]
    assert document["circumstances"]["command"].startswith("pore evaluate -m ")
    assert {"sweep.html", "sweep.csv", "sweep.tex", "samples"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert "are two jobs" in run(*common, "--all", code=1).stderr
    assert "leave out --layer, --normalize and --set" in run(*common, "--layer", "3", code=1).stderr
    assert "no method 'fastw'" in run(*common[:-1], "fastw", code=1).stderr
    assert "--table1 sets" in run(*common, "--table1", code=1).stderr
    assert "--table is one of table1, qwen2.5-vl" in run(*common, "--table", "2", code=1).stderr
    alone = run("evaluate", "-m", model, "--table1", code=1)
    assert "--table1 needs P of the model" in alone.stderr


def test_a_sweep_without_any_method_fails(model: Path, data: Path, tmp_path: Path) -> None:
    samples = ("evaluate", "-m", model, "-s", data / "samples.jsonl", "-o", tmp_path / "out")
    found = run(*samples, "--methods", "scored", "--keep", "8,4", code=1)
    said = " ".join(found.stderr.split())
    assert said.startswith("Error: No method can be asked. Scored: ")
    assert not (tmp_path / "out" / "sweep.json").exists()


def test_what_is_wrong_with_samples_is_said_before_the_model_is_loaded(
    data: Path, tmp_path: Path
) -> None:
    def told(*more: object, code: int = 1) -> str:
        found = run("evaluate", "-m", tmp_path / "no model", *more, code=code)
        return " ".join(found.stderr.split())

    samples = ("-s", data / "samples.jsonl")
    assert "None of the 6 samples" in told(*samples, "--columns", "answer=reply")
    assert "--columns answer=NAME" in told(*samples, "--columns", "answer=reply")
    assert '"ask" must be a text' in told(*samples, "--columns", "question=ask")
    assert "has 1 answer, and VQA accuracy compares" in told(*samples, "--metric", "vqa")
    assert "not the letter of an option" in told(*samples, "--metric", "choice")
    assert "no metric 'bleu'" in told(*samples, "--metric", "bleu", code=2)
    assert "nothing.jsonl: No such" in told(*samples, "--all", "--calibration", "nothing.jsonl")
    datasets.Dataset.from_dict({"image": ["a.png"], "question": ["q"]}).to_parquet(
        tmp_path / "d.parquet"
    )
    assert "None of the 1 samples" in told("-s", tmp_path / "d.parquet")
    both = datasets.DatasetDict(val=datasets.Dataset.from_dict({"image": ["a"], "ask": ["q"]}))
    both.save_to_disk(tmp_path / "saved")
    saved = ("-s", tmp_path / "saved")
    assert "has no split 'test'; it has val" in told(*saved)
    assert "no column 'question'; it has image, ask" in told(*saved, "--split", "val")


@pytest.mark.slow
def test_answers_of_ten_people(model: Path, data: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (data / "samples.jsonl").read_text().splitlines()]
    common = ("evaluate", "-m", model, "--keep", "4", "--no-timing", "--max-new-tokens", "2")
    run(*common, "-s", data / "samples.jsonl", "-o", tmp_path / "exact")
    read = (tmp_path / "exact" / "predictions.jsonl").read_text().splitlines()
    said = [json.loads(line)["prediction"] for line in read]
    people = tmp_path / "people.jsonl"
    people.write_text(
        "\n".join(
            json.dumps(line | {"image": str(data / line["image"]), "answer": [own] * 3 + ["?"] * 7})
            for line, own in zip(lines, said, strict=False)
        )
    )
    found = run(*common, "-s", people, "--metric", "vqa", "-o", tmp_path / "vqa")
    assert "VQA accuracy in % with 95 % interval" in found.output
    first, second = read_records(tmp_path / "vqa" / "results.json")
    assert first["metric"] == "vqa"
    assert first["accuracy"] == pytest.approx(0.9)
    assert first["ci"] == pytest.approx([0.9, 0.9])
    assert second["metric"] == "vqa"
    files = [tmp_path / name / "results.json" for name in ("exact", "vqa")]
    assert "scored by other rules: exact and vqa" in run("compare", *files, code=1).stderr


@pytest.mark.parametrize("kept", [False, True])
def test_interrupted(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """What is known is printed; with a folder the same command goes on."""
    out = ("-o", tmp_path / "out") if kept else ()
    command = ("evaluate", "-m", model, "-s", data / "samples.jsonl", "--keep", "4", *out)
    command = (*command, "--max-new-tokens", "2", "-b", "2", "--no-timing")
    ask, left = own.evaluate, [4]

    def stops(*args: Any, **more: Any) -> Any:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return ask(*args, **more)

    monkeypatch.setattr(own, "evaluate", stops)
    found = run(*command, code=130)
    assert "1 of 2 settings are done. FastV, keep 4 has answered 2 of 6 questions" in found.stderr
    if not kept:
        assert "unpruned" in found.output
        assert "With --out FOLDER nothing is lost" in found.stderr
        return
    assert "the same command goes on from there" in found.stderr
    left[0] = 2
    run(*command)
    assert left[0] == 0
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 12
    run(*command)  # it asks nothing more
