"""Every correction on every host: what is asked, what is kept, and what more questions add."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pore
from helpers.pages import checked_page
from helpers.survey import ABOUT, SETTINGS
from pore.corrections import HeadBiases, NullTokenPrior, Subtracted, WithoutRoPE
from pore.data.loading import load_model
from pore.data.sources import load_samples
from pore.engine.pruner import Pruner
from pore.errors import CalibrationError
from pore.evaluation import comparing, own
from pore.evaluation.candidates import CANDIDATES, NONE
from pore.evaluation.comparing import Comparison
from pore.evaluation.corrections_page import write_corrections
from pore.evaluation.files import read_records
from pore.evaluation.store import described

HOSTS = ("FastV", "PyramidDrop", "SGL", "D2Pruner", "Random", "FitPrune")


@pytest.fixture(autouse=True)
def _hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pruner, "registry", {name: pore.methods()[name] for name in HOSTS})
    monkeypatch.setattr(comparing, "BLOCK", 4)


def compared(checkpoint: Path, out: Path, n: int, **changes: Any) -> Comparison:
    model, processor = load_model(str(checkpoint))
    given: dict[str, Any] = {
        "calibration": list(load_samples("embedded:calibration", limit=6)),
        "test": list(load_samples("embedded:fresh", limit=n)),
        "out": out,
        "settings": replace(SETTINGS, keeps=(4,), timing=False),
        "source": "cal",
    }
    return comparing.run(model, processor, **(given | changes))


@pytest.mark.slow
def test_every_correction_is_asked_on_every_host(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    evaluate = own.evaluate

    def counted(model: Any, processor: Any, batches: Any, *args: Any, **given: Any) -> Any:
        found = evaluate(model, processor, batches, *args, **given)
        asked.append(len(batches.samples))
        return found

    monkeypatch.setattr(own, "evaluate", counted)
    result = compared(checkpoint, tmp_path, 4)
    done = {(one.outcome.method, one.setting.correction) for one in result.compared}
    refused = {one.method for one in result.left_out}
    assert ("unpruned", NONE) in done
    for host in ("FastV", "D2Pruner"):  # four rows are too few for a spline over rows
        made = {name for method, name in done if method == host}
        assert made == {NONE, *CANDIDATES} - {"rows × columns"}
    assert {one for one in refused if "rows" not in one} == {
        "FitPrune, per head",
        "FitPrune, geometric, per head",
        *(f"SGL, {name}" for name in ("per head", "geometric, per head", "without RoPE")),
        *(f"SGL, null token, {by}" for by in ("ratio", "log ratio")),
    }
    first = len(asked)  # settings of equal corrections, as auto and the one it chose, share answers
    assert asked == [4] * first
    assert len(result.compared) - 12 < first <= len(result.compared)

    # More questions are asked alone, and the same again not at all.
    more = compared(checkpoint, tmp_path, 6)
    assert more.questions == 6
    assert asked[first:] == [2] * first
    for before, after in zip(result.compared, more.compared, strict=True):
        assert after.outcome.answers[:4] == before.outcome.answers
    asked.clear()
    again = compared(checkpoint, tmp_path, 6)
    assert not asked
    assert [one.record() for one in again.compared] == [one.record() for one in more.compared]


@pytest.mark.slow
def test_what_is_written(checkpoint: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, keeps=(4,))
    names = ("spline", "subtracted")
    result = compared(checkpoint, tmp_path, 3, names=names, settings=settings)
    records = read_records(tmp_path / "results.json")
    assert {r["reweight"] for r in records} == {None, *names}
    assert all(record["prefill_ms"] > 0 and record["n"] == 3 for record in records)
    differences = json.loads((tmp_path / "differences.json").read_text())["differences"]
    whole = [each for each in differences if each["third"] is None]
    assert [(r["method"], r["reweight"]) for r in records if r["reweight"]] == [
        (each["method"], each["reweight"]) for each in whole
    ]
    assert (tmp_path / "corrections.png").stat().st_size > 0
    page = checked_page(write_corrections(result, ABOUT, tmp_path).read_text())
    assert page.text.count("subtracted") >= 3
    plain = [o for o in result.compared if o.setting.correction == NONE]
    assert not any(one.differences for one in plain)


@pytest.mark.slow
def test_a_host_that_fails_is_left_out(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise CalibrationError("not this one")

    monkeypatch.setattr(pore.PyramidDrop, "counts", fails)
    result = compared(checkpoint, tmp_path, 2, names=("spline",))
    assert ("PyramidDrop", "not this one") in {(o.method, o.reason) for o in result.left_out}
    assert "PyramidDrop" not in {one.outcome.method for one in result.compared}


def test_corrections_are_told_apart_by_what_they_hold() -> None:
    rising, steep = (pore.PositionBias.exponential(rate, 16) for rate in (0.01, 0.1))
    corrections = [
        *(rising, steep, rising.with_strength(0.5)),
        *(Subtracted(rising), Subtracted(steep), Subtracted(rising, 0.4)),
        *(HeadBiases((rising,)), HeadBiases((steep,))),
        *(WithoutRoPE(), NullTokenPrior(), NullTokenPrior("ratio")),
    ]
    told = [json.dumps(described(pore.FastV(4, reweight=one))) for one in corrections]
    assert len(set(told)) == len(corrections)
