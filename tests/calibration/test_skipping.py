"""Bad samples: skipped and counted, up to a share of all."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.calibrations import run, spoil
from pore.calibration import measuring
from pore.data.prompts import build_inputs
from pore.data.samples import Sample
from pore.errors import CalibrationError, ScoreError


def test_bad_samples_are_skipped_and_counted(
    model: Any,
    processor: Any,
    samples: list[Sample],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "pore.calibration"):
        found = run(model, processor, spoil(samples, tmp_path), max_bad=0.3)
    assert [one.id for one in found.bad] == ["0/1", "0/2", "0/6"]
    assert "missing.png" in found.bad[0].reason
    assert "<image>" in found.bad[2].reason
    assert len(caplog.records) == 3
    assert "0/2" in caplog.text
    assert (found.seen, found.count) == (13, 10)
    good = [s for i, s in enumerate(samples) if i not in (1, 2, 6)]
    torch.testing.assert_close(found.mean, run(model, processor, good).mean, rtol=1e-10, atol=0)


def test_too_many_bad_samples_fail(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path
) -> None:
    spoilt = spoil(samples, tmp_path)
    # The second bad one of thirteen decides it, though eleven might be good.
    with pytest.raises(CalibrationError, match=r"2 of 4 samples are bad.*max_bad=0\.1.*missing"):
        run(model, processor, spoilt, max_bad=0.1)
    # Of unknown length, it is known only at the end.
    with pytest.raises(CalibrationError, match="3 of 13 samples are bad"):
        run(model, processor, iter_only(spoilt), max_bad=0.1)
    # A higher share goes on from there.
    file = tmp_path / "state.json"
    with pytest.raises(CalibrationError, match="2 of 4"):
        run(model, processor, spoilt, max_bad=0.1, checkpoint=file)
    assert run(model, processor, spoilt, max_bad=0.3, checkpoint=file).count == 10


def iter_only(samples: list[Sample]) -> Iterator[Sample]:
    yield from samples


def test_mostly_bad_fails_early(model: Any, processor: Any, tmp_path: Path) -> None:
    missing = (Sample(f"{i}", tmp_path / f"{i}.png", "w7") for i in range(10**9))
    with pytest.raises(CalibrationError, match="52 of 52 samples are bad"):
        run(model, processor, missing)


def test_no_good_sample_is_an_error(model: Any, processor: Any) -> None:
    with pytest.raises(CalibrationError, match="no sample"):
        run(model, processor, [])
    without = Sample("a", None, "w7")
    with pytest.raises(CalibrationError, match=r"No image was measured.*a: Sample a has no image"):
        run(model, processor, [without], max_bad=1)


def test_one_sample_that_gives_nan_is_bad(
    model: Any, processor: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_pixels(monkeypatch, "w50 w50")
    found = run(
        model, processor, [*samples[:5], replace(samples[5], question="w50 w50")], max_bad=0.2
    )
    assert [(one.id, "NaN" in one.reason) for one in found.bad] == [("0/5", True)]
    assert found.count == 5
    assert torch.isfinite(found.mean).all()


def spoil_pixels(monkeypatch: pytest.MonkeyPatch, question: str | None) -> None:
    """Let the pixels of all samples, or of those with a question, be NaN."""

    def spoilt(processor: Any, samples: list[Sample], *args: Any) -> Any:
        inputs = build_inputs(processor, samples, *args)
        for i, sample in enumerate(samples):
            if question in (None, sample.question):
                inputs["pixel_values"][i] = torch.nan
        return inputs

    monkeypatch.setattr(measuring, "build_inputs", spoilt)


def test_nan_throughout_is_an_error(
    model: Any, processor: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_pixels(monkeypatch, None)
    with pytest.raises(ScoreError, match="layer 2 is NaN or infinite from the start"):
        run(model, processor, samples, max_bad=1)
