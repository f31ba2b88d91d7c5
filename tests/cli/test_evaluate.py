"""`pore evaluate`, `pore demo` and `pore bench`, on a tiny checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pore
from helpers.checkpoint import save_checkpoint
from helpers.command_line import run
from pore.errors import UnsupportedModelError
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


def test_evaluate_corrections(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = {name: methods()[name] for name in ("FastV", "FasterVLM")}
    monkeypatch.setattr(pore.Pruner, "registry", some)
    common = ("evaluate", "--corrections", "-m", model, "--limit", "3", "--images", "4")
    common = (*common, "--no-timing", "--max-new-tokens", "2", "--keep", "4", "-o", tmp_path)
    found = run(*common)
    assert "spline, half strength" in found.output
    assert "3 questions were asked under every setting" in found.output
    assert {"FastV", "unpruned"} == {
        record["method"] for record in read_records(tmp_path / "results.json")
    }
    assert "two jobs" in run(*common, "--all", code=1).stderr
    assert "--corrections takes every method" in run(*common, "--layer", "3", code=1).stderr
    assert "not --average" in run(*common, "--average", code=1).stderr


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
