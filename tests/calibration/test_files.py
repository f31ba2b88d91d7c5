"""Files of calibrations: what is saved comes back, and nothing else is taken for one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.calibrations import run, spoil
from helpers.models import N
from pore.calibration.sums import Calibration
from pore.data.samples import Sample
from pore.errors import CalibrationError


def test_save_and_load(model: Any, processor: Any, samples: list[Sample], tmp_path: Path) -> None:
    found = run(model, processor, spoil(samples, tmp_path), max_bad=0.5)
    assert Calibration.load(found.save(tmp_path / "new" / "c.json")) == found


def set_to(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.update({name: value})


@pytest.mark.parametrize(
    "damage",
    [
        set_to("schema", "pore.position_bias"),
        set_to("version", 2),
        set_to("more", 1),
        set_to("provenance", {"model": 1}),
        set_to("provenance", {"secret": 1}),
        set_to("passes", []),
        set_to("count", True),
        set_to("count", -1),
        set_to("seen", 0),
        set_to("bad", [["a"]]),
        set_to("grid", [2, 3]),
        set_to("grid", ["4", "4"]),
        set_to("sums", []),
        set_to("sums", [-1] * N),
        set_to("sums", [0.5] * N),
        set_to("squares", [1] * N),
        set_to("squares", [1 << 200] * N),
    ],
)
def test_damaged_files_are_refused(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path, damage: Any
) -> None:
    bad = replace(samples[0], image=tmp_path / "missing")
    file = run(model, processor, [bad, samples[1]], max_bad=1).save(tmp_path / "c.json")
    document = json.loads(file.read_text())
    damage(document)
    file.write_text(json.dumps(document))
    with pytest.raises(CalibrationError, match=r"c\.json is no calibration"):
        Calibration.load(file)


@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b"\xff", b"[]", b'{"sums": [1' + b"0" * 10_000 + b"]}"]
)
def test_hostile_files_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "c.json"
    file.write_bytes(content)
    with pytest.raises(CalibrationError, match="is no calibration"):
        Calibration.load(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="Cannot read"):
        Calibration.load(tmp_path / "c.json")
