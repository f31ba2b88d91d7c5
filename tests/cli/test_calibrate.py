"""`pore calibrate` and `pore plot`, on a tiny checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest

import pore
from helpers.calibrations import Stepwise
from helpers.command_line import run
from helpers.sums import WHERE, attention_of, measured, sums_of
from pore.bias.position_bias import PositionBias
from pore.bias.stages import load_biases
from pore.calibration import stability
from pore.calibration.host import HostCalibration
from pore.calibration.sums import Calibration


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


def test_calibrate_a_data_set(model: Path, data: Path, profile: Path, tmp_path: Path) -> None:
    """Parquet by other names gives what the lines give; a row without a question is one bad one."""
    lines = [json.loads(line) for line in (data / "samples.jsonl").read_text().splitlines()]
    rows = {
        "photo": [(data / line["image"]).read_bytes() for line in [*lines, lines[0]]],
        "ask": [*(line["question"] for line in lines), None],
    }
    file, out = tmp_path / "rows.parquet", tmp_path / "p.json"
    datasets.Dataset.from_dict(rows).to_parquet(file)
    given = (
        "calibrate",
        "-m",
        model,
        "-s",
        file,
        "-o",
        out,
        "--columns",
        "image=photo,question=ask",
    )
    assert "1 of 7 samples are bad" in run(*given, code=1).output
    run(*given, "--max-bad", "0.2")
    found = Calibration.load(tmp_path / "p.calibration.json")
    same = Calibration.load(profile.with_name("p.calibration.json"))
    assert (found.seen, found.count, found.sums) == (7, 6, same.sums)
    assert [one.reason for one in found.bad] == ["Sample 6 has no text in the column 'ask'."]


@pytest.mark.slow
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


@pytest.mark.slow
def test_plot(model: Path, data: Path, profile: Path, tmp_path: Path) -> None:
    samples = data / "samples.jsonl"
    run("evaluate", "-m", model, "-s", samples, "-o", tmp_path, "--keep", "4", "--no-timing")
    sums = profile.with_name("p.calibration.json")
    run("plot", sums, tmp_path / "results.json", "-o", tmp_path / "figures", "--kind", "spline")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"figure1.png", "figure2.png", "accuracy.png"}


def test_until_stable(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("-m", model, "-s", data / "samples.jsonl", "-b", "2", "--until-stable", "-o")
    found = run("calibrate", *given, tmp_path / "all.json")
    assert "in 19 of 20 bootstrap draws" in found.output
    bias = PositionBias.load(tmp_path / "all.json")
    assert bias.provenance.samples == 6
    assert bias.provenance.stability is not None
    assert bias.provenance.stability["stopped"] is False
    assert bias.provenance.stability["keep"] == 0.25
    monkeypatch.setattr(stability, "_FIRST", 4)
    monkeypatch.setattr(stability, "STABLE", 0.0)
    run("calibrate", *given, tmp_path / "few.json", "--kind", "empirical")
    bias = PositionBias.load(tmp_path / "few.json")
    assert bias.provenance.samples == 4
    assert bias.provenance.stability is not None
    assert bias.provenance.stability["stopped"] is True


@pytest.mark.slow
def test_what_is_said_of_p(model: Path, data: Path, tmp_path: Path) -> None:
    samples = ("-m", model, "-s", data / "samples.jsonl", "-o", tmp_path / "p.json")
    page = tmp_path / "page.html"
    found = run("calibrate", *samples, "--page", page, "--keep", "4")
    assert "Decoder layer 1: " in found.output
    assert "Error on images not fitted to: flat (no bias) " in found.output
    assert "The mean of 6 images has a standard error of " in found.output
    assert found.output.count("keep 4") >= 1
    text = page.read_text()
    assert "pore " in text
    assert text.count("data:image/png;base64,") == 8  # four figures, for phones too
    again = ("--heads", "--checkpoint", tmp_path / "heads.json")
    found = run("calibrate", *samples, "--kind", "spline", *again)
    assert "P of every head is not judged by itself" in found.output


def test_one_image_is_no_diagnosis(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    common = ("-m", model, "-s", data / "samples.jsonl", "-o", out, "--limit", "1")
    found = run("calibrate", *common, "--kind", "empirical")
    assert "No diagnosis. Choosing a curve by its held-out error needs images" in found.output
    assert PositionBias.load(out).provenance.samples == 1


def test_a_page_says_why_there_is_no_p(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spike = np.where(WHERE > 11 / 12, 4.8, 0.4)
    spiked = HostCalibration((sums_of(attention_of(spike, 50)),))
    monkeypatch.setattr("pore.calibration.calibrating.calibrate", lambda *_, **__: spiked)
    common = ("-m", model, "-s", data / "samples.jsonl", "-o", tmp_path / "p.json")
    how = ("--mean", "arithmetic", "--page", tmp_path / "page.html")
    found = run("calibrate", *common, *how, code=1)
    assert "Do not divide by P. No curve can be divided by." in found.output
    assert "No curve can be divided by" in found.stderr
    assert "Do not divide by P." in (tmp_path / "page.html").read_text()
    assert not (tmp_path / "p.json").exists()


@pytest.mark.slow
def test_images_of_several_sizes_have_a_figure(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = HostCalibration((measured("distance"),))
    monkeypatch.setattr("pore.calibration.calibrating.calibrate", lambda *_, **__: mixed)
    common = ("-m", model, "-s", data / "samples.jsonl", "-o", tmp_path / "p.json")
    found = run("calibrate", *common, "--figures", tmp_path / "figures", "--over", "place")
    assert "Divide by P. P (" in found.output
    assert "over the column" in found.output
    sums = mixed.save(tmp_path / "sums.json")
    run("plot", sums, "-o", tmp_path / "again", "--kind", "spline")
    for folder in ("figures", "again"):
        assert [path.name for path in (tmp_path / folder).iterdir()] == ["any_size.png"]
