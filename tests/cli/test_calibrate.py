"""`pore calibrate` and `pore plot`, on a tiny checkpoint folder."""

from __future__ import annotations

from pathlib import Path

import pytest

import pore
from helpers.calibrations import Stepwise
from helpers.command_line import run
from pore.bias.position_bias import PositionBias
from pore.bias.stages import load_biases


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
