"""`pore merge`, on sums that were measured in two parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.command_line import run
from pore.bias.position_bias import PositionBias
from pore.calibration.sums import Calibration


@pytest.fixture(scope="module")
def parts(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The sums of the first four samples, and of the other two."""
    folder = tmp_path_factory.mktemp("parts")
    lines = (data / "samples.jsonl").read_text().splitlines()
    for name, own in (("a", lines[:4]), ("b", lines[4:])):
        rows = [json.loads(line) for line in own]
        for row in rows:
            row["image"] = str(data / row["image"])
        samples = folder / f"{name}.jsonl"
        samples.write_text("\n".join(map(json.dumps, rows)))
        run("calibrate", "-m", model, "-s", samples, "-o", folder / f"{name}.json")
    return [folder / "a.calibration.json", folder / "b.calibration.json"]


def test_merged_parts_are_the_whole(parts: list[Path], profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "whole.json"
    found = run("merge", *parts, "-o", out)
    assert "2 files hold 6 images." in found.output
    assert "Decoder layer 1: " in found.output
    merged = Calibration.load(tmp_path / "whole.calibration.json")
    whole = Calibration.load(profile.with_name("p.calibration.json"))
    assert (merged.sums, merged.squares, merged.count) == (whole.sums, whole.squares, 6)
    one, other = PositionBias.load(out), PositionBias.load(profile)
    assert one.values.tolist() == other.values.tolist()
    assert one.provenance.samples == 6


def test_what_does_not_go_together_is_refused(
    parts: list[Path], profile: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    out = ("-o", tmp_path / "c.json")
    twice = run("merge", parts[0], parts[0], *out, code=1).stderr
    assert "a.calibration.json cannot be merged with" in twice
    assert "hold the same samples" in twice
    assert "name two files of sums or more" in run("merge", parts[0], *out, code=1).stderr
    of_p = run("merge", profile, profile, *out, code=1).stderr
    assert "p.json is no calibration, or damaged: it holds P; the sums" in of_p
    other = tmp_path / "other.json"
    samples = ("-s", data / "samples.jsonl", "--layer", "3")
    run("calibrate", "-m", model, *samples, "-o", other)
    sums = other.with_name("other.calibration.json")
    assert "layer is 2 here and 3 there" in run("merge", parts[0], sums, *out, code=1).stderr
    onto = run("merge", *parts, "-o", parts[0].with_name("b.json"), code=1).stderr
    assert "would overwrite" in onto
    assert not (tmp_path / "c.json").exists()
    assert not (tmp_path / "c.calibration.json").exists()
