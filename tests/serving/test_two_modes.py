"""The script that compares the two modes, on a few questions."""

from __future__ import annotations

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "two_modes.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = spec_from_file_location("two_modes", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "two_modes", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_both_modes_are_asked(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "modes.json"
    few = ["--limit", "7", "--calibration", "14", "--keep", "144", "14", "--batch-size", "4"]
    script.main([*few, "--out", str(out)])
    found = json.loads(out.read_text())
    assert len(found["results"]) == 1 + 2 * (2 * 2 + 1)
    given = found["given"]
    whole = given["unpruned, 144, in_llm"]
    assert len(whole) == 7
    for method in ("FastV", "FastV + PoRe"):  # all are kept: both are the unpruned model
        for mode in ("in_llm", "reencode"):
            assert given[f"{method}, 144, {mode}"] == whole
    assert given["FastV, 14, reencode"] != whole
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in lines) == 6
