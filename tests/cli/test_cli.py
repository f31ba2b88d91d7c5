"""The command line, in one process through typer's runner, on a tiny checkpoint folder."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from click.testing import Result
from typer.testing import CliRunner

import pore
from helpers.calibrations import Stepwise
from helpers.checkpoint import save_checkpoint
from pore.bias.position_bias import PositionBias
from pore.bias.stages import load_biases
from pore.cli.app import app
from pore.errors import UnsupportedModelError
from pore.evaluation.records import FIELDS, read_records
from pore.families.registry import families
from pore.methods.registry import methods

COMMANDS = (
    "demo",
    "calibrate",
    "generate",
    "evaluate",
    "bench",
    "plot",
    "flops",
    "methods",
    "models",
    "check",
)


def run(*arguments: object, code: int = 0) -> Result:
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert found.exit_code == code, (found.output, found.exception)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images with questions, as a JSONL file."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(6):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(
            {"image": f"{i}.png", "question": f"w{6 + i} w20", "answer": "w6", "kind": "k"}
        )
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def profile(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profile") / "p.json"
    samples = data / "samples.jsonl"
    found = run(
        "calibrate", "-m", model, "-s", samples, "-o", out, "--figures", out.parent / "figures"
    )
    assert "PositionBias(exponential" in found.output
    return out


# -- help and lists -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str) -> None:
    text = run(command, "--help").output
    if command not in ("methods", "models"):
        assert f"pore {command}" in text.split("Examples", 1)[1]


def test_help_lists_every_command() -> None:
    text = run("--help").output
    assert all(command in text for command in COMMANDS)


def test_version() -> None:
    assert run("--version").output.strip() == f"pore {pore.__version__}"


def test_methods_come_from_the_registry() -> None:
    text = run("methods").output
    for name, kind in methods().items():
        assert name in text
        assert all(field.name in text for field in fields(kind))  # type: ignore[arg-type]


def test_models_come_from_the_registry() -> None:
    text = run("models").output
    for model_type, family in families().items():
        assert model_type in text
        assert family.name in text
    assert "Set up with more than a model: SGL, Scored" in text


def test_models_as_json_say_what_works_and_why_not() -> None:
    rows = json.loads(run("models", "--json").stdout)
    assert {kind for row in rows for kind in row["model_types"]} == set(families())
    listed = {row["family"]: row["methods"] for row in rows}
    assert all(entry == {"works": True, "limits": []} for entry in listed["LLaVA-1.5"].values())
    tome = listed["LLaVA-NeXT"]["ToMe"]
    assert not tome["works"]
    assert "cannot meet a budget" in tome["limits"][0]["reason"]
    recurrent = listed["Qwen3.5"]["FastV"]
    assert recurrent["works"]
    assert recurrent["limits"][0]["unless"] == "the layers that it reads have attention"


# -- flops ----------------------------------------------------------------------------------------


def test_flops_reproduces_table_1() -> None:
    rows = json.loads(run("flops", "--json").stdout)
    counts = [round(row["paper"]["layer_mean"] / 1e9, 1) for row in rows]
    assert counts == [99.2, 54.6, 32.8, 30.4, 19.9]
    assert [row["tokens_kept"] for row in rows] == [576, 288, 144, 128, 58]
    text = run("flops").output
    assert all(str(count) in text for count in counts)


def test_flops_of_a_checkpoint(model: Path) -> None:
    rows = json.loads(run("flops", "-m", model, "--keep", "4", "--json").stdout)
    assert [row["tokens"] for row in rows] == [[51] * 5, [51] * 2 + [39] * 3]


# -- calibrate, plot ------------------------------------------------------------------------------


def test_calibrate_writes_profile_sums_and_figures(profile: Path) -> None:
    bias = PositionBias.load(profile)
    assert (len(bias), bias.grid, bias.provenance.samples) == (16, (4, 4), 6)
    assert bias.provenance.layer == 2
    names = {path.relative_to(profile.parent).as_posix() for path in profile.parent.rglob("*.*")}
    assert names == {
        "p.json",
        "p.calibration.json",
        "figures/figure1.png",
        "figures/figure2.png",
    }


def test_calibrate_a_folder_of_images(model: Path, data: Path, tmp_path: Path) -> None:
    questions = tmp_path / "ask.txt"
    questions.write_text("w6 w7\nw8\n")
    out = tmp_path / "p.json"
    run("calibrate", "-m", model, "-s", data, "--questions", questions, "-o", out, "--limit", "5")
    assert PositionBias.load(out).provenance.samples == 5


def test_calibrate_a_host_of_several_stages(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pore.Pruner.registry, "Stepwise", Stepwise)
    out = tmp_path / "p.json"
    common = ("-m", model, "-s", data / "samples.jsonl", "--method", "stepwise")
    found = run("calibrate", *common, "-o", out, "--set", "scale=2", "--figures", tmp_path)
    assert found.output.count("PositionBias(") == 2
    assert [bias.provenance.layer for bias in load_biases(out)] == [3, 4]
    names = {path.name for path in tmp_path.iterdir()} - {"p.json", "p.calibration.json"}
    drawn = {f"figure{number}-layer{layer}.png" for number in (1, 2) for layer in (3, 4)}
    assert names == drawn
    run("plot", tmp_path / "p.calibration.json", "-o", tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == drawn


def test_plot(model: Path, data: Path, profile: Path, tmp_path: Path) -> None:
    samples = data / "samples.jsonl"
    run("evaluate", "-m", model, "-s", samples, "-o", tmp_path, "--keep", "4", "--no-timing")
    sums = profile.with_name("p.calibration.json")
    run("plot", sums, tmp_path / "results.json", "-o", tmp_path / "figures", "--kind", "spline")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"figure1.png", "figure2.png", "accuracy.png"}


# -- generate -------------------------------------------------------------------------------------


def test_generate_draws_what_is_kept(
    model: Path, data: Path, profile: Path, tmp_path: Path
) -> None:
    draw = tmp_path / "kept.png"
    common = ("generate", data / "0.png", "w6 w7", "-m", model, "--max-new-tokens", "3")
    found = run(*common, "--keep", "25%", "--reweight", profile, "--draw", draw)
    assert "16 -> 4" in found.output
    with PIL.Image.open(draw) as image:
        assert image.format == "PNG"
    as_json = json.loads(run(*common, "--keep", "4", "--json").stdout)
    (image_report,) = as_json["report"]["samples"][0]["images"]
    assert len(image_report["kept"]) == 4


def test_generate_unpruned_equals_keeping_all(model: Path, data: Path) -> None:
    common = ("generate", data / "0.png", "w6", "-m", model, "--max-new-tokens", "4", "--json")
    plain = json.loads(run(*common, "--unpruned").stdout)
    assert plain["report"] is None
    assert json.loads(run(*common, "--keep", "1.0").stdout)["answer"] == plain["answer"]


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


def test_generate_with_a_bias_by_name(model: Path, data: Path) -> None:
    common = ("generate", data / "0.png", "w6", "-m", model, "--max-new-tokens", "1")
    run(*common, "--reweight", "rope")
    assert "none.json" in run(*common, "--reweight", "none.json", code=1).stderr
    found = run(*common, "--reweight", "published:himap/gqa", code=1)
    assert "measured under other conditions: model" in found.stderr
    allowed = ("--reweight", "published:himap/gqa", "--allow", "model")
    assert "the profile has 576, here are 16" in run(*common, *allowed, code=1).stderr


def test_a_bias_of_another_template_is_refused(
    model: Path, data: Path, profile: Path, tmp_path: Path
) -> None:
    document = json.loads(profile.read_text())
    document["provenance"]["template"] = "Q: {question} A:"
    del document["checksum"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    common = ("generate", data / "0.png", "w6", "-m", model, "--max-new-tokens", "1")
    found = run(*common, "--reweight", other, code=1)
    assert "template: the profile says 'Q: {question} A:'" in found.stderr
    run(*common, "--reweight", other, "--allow", "template")
    assert "choose from" in run(*common, "--reweight", other, "--allow", "n0", code=1).stderr


def test_generate_sets_any_setting(model: Path, data: Path) -> None:
    common = ("generate", data / "0.png", "w6", "-m", model, "--max-new-tokens", "1", "--json")
    random = (*common, "--method", "random", "--layer", "3")
    one, same, other = (run(*random, "--set", f"seed={seed}").stdout for seed in (1, 1, 5))
    assert one == same != other
    found = run(*random, "--set", "sede=1", code=1)
    assert "Random has no setting 'sede'; it has keep, layer, seed." in found.stderr
    run(*common, "--method", "vtc-cls", "--set", "start_layer=0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pore.VTCCLS, "usual", lambda *_: None)
        run(*common, "--method", "vtc-cls", "--set", "start_layer=0")
        found = run(*common, "--method", "vtc-cls", code=1)
    assert "VTC-CLS needs more than a budget: --set start_layer=..." in found.stderr


def test_generate_by_the_mean_over_layers(model: Path, data: Path) -> None:
    common = ("generate", data / "0.png", "w6", "-m", model, "--max-new-tokens", "1", "--json")
    found = json.loads(run(*common, "--keep", "10", "--average").stdout)["report"]["samples"][0]
    assert found["mean_visual_tokens"] == 10  # (2 · 16 + 3 · 6) / 5
    assert len(found["images"][0]["kept"]) == 6
    assert "averages 7 at least" in run(*common, "--keep", "4", "--average", code=1).stderr


# -- evaluate, demo, bench ------------------------------------------------------------------------


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


def test_demo(model: Path, tmp_path: Path) -> None:
    found = run(
        *("demo", "-m", model, "--images", "4", "--questions", "3", "--keep", "25%"),
        *("-o", tmp_path, "-b", "3"),
    )
    assert len(read_records(tmp_path / "results.json")) == 6
    assert tuple(json.loads((tmp_path / "results.json").read_text())[0]) == (*FIELDS, "checksum")
    assert "FastV + RoPE prior" in found.output
    assert "report.html" in found.output
    assert (tmp_path / "report.html").exists()


def test_bench_of_a_checkpoint(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    run(
        *("bench", "-m", model, "--keep", "4", "--repeats", "1", "--warmup", "0"),
        *("--text-before", "3", "--text-after", "2", "--new-tokens", "2", "-o", out),
    )
    assert json.loads(out.read_text())


# -- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("flops", "--shape", "nonsense"), "'nonsense' is not a shape"),
        (("flops", "--layer", "99"), "layer"),
        (("plot", "missing.json"), "missing.json"),
        (("generate", "missing.png", "q"), "missing.png"),
        (("calibrate", "-m", "MODEL", "-s", "./missing"), "There is no file or folder ./missing"),
        (("calibrate", "-m", "MODEL", "--layer", "9", "--limit", "1"), "choose 1 to 4"),
        (("evaluate", "-m", "MODEL", "--method", "magic", "--limit", "1"), "no method 'magic'"),
        (("evaluate", "-m", "MODEL", "--keep", "0", "--limit", "1"), "keep=0 would keep no"),
        (("evaluate", "-m", "MODEL", "--keep", "17", "--limit", "1"), "asks for more visual"),
        (("evaluate", "-m", "MODEL", "--keep", "nan", "--limit", "1"), "keep=nan"),
        (("evaluate", "-m", "./no-model"), "no-model"),
        (("evaluate", "-m", "MODEL", "--device", "abacus"), "There is no device 'abacus'"),
        (("evaluate", "-m", "MODEL", "--dtype", "int3"), "'int3' is no number format"),
        (("evaluate", "-m", "MODEL", "--attn", "none"), "cannot load"),
        (
            ("evaluate", "-m", "MODEL", "--method", "random", "--reweight", "rope", "--limit", "1"),
            "does not rank by text-visual attention",
        ),
    ],
)
def test_errors_are_messages(model: Path, arguments: tuple[str, ...], message: str) -> None:
    given = [str(model) if argument == "MODEL" else argument for argument in arguments]
    found = run(*given, code=1)
    assert message in found.stderr
    assert "Traceback" not in found.output
    assert len(found.stderr.strip().splitlines()) == 1


def test_debug_gives_the_error_itself() -> None:
    found = CliRunner().invoke(app, ["--debug", "flops", "--shape", "nonsense"])
    assert isinstance(found.exception, pore.PoreError)


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("flops", "--no-such-option"),
        ("generate",),
        ("bench",),
        ("bench", "--shape", "llava-64x2", "-m", "embedded"),
        ("flops", "--keep", "many"),
        ("flops", "--keep", "x%"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    run(*arguments, code=2)


def test_interruption_exits_with_130(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt("half of it is done")

    monkeypatch.setattr("pore.calibration.calibrating.calibrate", interrupted)
    found = run("calibrate", "-m", model, "--limit", "1", code=130)
    assert "Interrupted. half of it is done" in found.stderr


def test_text_only_and_unknown_models_are_refused_before_loading(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    found = run("evaluate", "-m", tmp_path, code=1)
    assert re.search(r"'llama' model, of no family that pore knows.*llava", found.stderr)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    found = run("evaluate", "-m", tmp_path, code=1)
    assert "cannot be read" in found.stderr
