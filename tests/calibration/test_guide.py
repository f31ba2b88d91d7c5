"""Calibration of the model that guides SGL."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pore
from helpers.calibrations import HOST, make_samples
from helpers.models import IMAGE, N
from pore.calibration import measuring
from pore.calibration.calibrating import calibrate, calibrate_guide
from pore.calibration.host import HostCalibration
from pore.calibration.sums import Calibration
from pore.data.prompts import build_inputs
from pore.data.samples import Sample
from pore.errors import CalibrationError, ScoreError


class TestGuide:
    def test_it_is_the_mean_importance(self, model: Any, processor: Any, samples: Any) -> None:
        samples = samples[:6]
        found = calibrate_guide(model, processor, samples, max_new_tokens=3, batch_size=4)
        total = torch.zeros(N, dtype=torch.float64)
        for sample in samples:
            inputs = build_inputs(processor, [sample], torch.device("cpu"), torch.float64)
            guide = pore.guide(model, inputs, max_new_tokens=3)
            total += guide.importance[0]
        torch.testing.assert_close(found.mean, total / 6, rtol=1e-9, atol=0)
        assert found.count == 6
        bias = found.fit()
        assert (bias.provenance.host, bias.provenance.layer) == ("SGL", None)
        assert bias.provenance.normalize == guide.provenance.normalize
        inputs = build_inputs(processor, samples[:2], torch.device("cpu"), torch.float64)
        guide = pore.guide(model, inputs, max_new_tokens=3)
        with torch.no_grad(), pore.SGL(5, layer=1, guide=guide, reweight=bias)(model) as run:
            model(**inputs)
        for curve, sample in zip(guide.importance / bias.values, run.report, strict=True):
            best = sorted(curve.argsort(descending=True, stable=True)[:5].tolist())
            assert list(sample.images[0].kept) == best

    def test_goes_on_where_it_stopped(
        self, model: Any, processor: Any, samples: Any, tmp_path: Path
    ) -> None:
        path = tmp_path / "guide.json"

        def go(given: Any, longest: int = 2) -> Calibration:
            return calibrate_guide(
                *(model, processor, given),
                max_new_tokens=longest,
                batch_size=4,
                checkpoint=path,
                progress=False,
            )

        def broken() -> Iterator[Sample]:
            yield from samples[:6]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt, match="after 4 samples"):
            go(broken())
        with pytest.raises(CalibrationError, match="answers have another length"):
            go(samples, longest=3)
        whole = calibrate_guide(model, processor, samples, max_new_tokens=2, batch_size=4)
        assert go(samples) == whole == Calibration.load(path)
        with pytest.raises(CalibrationError, match="host is 'FastV' here and 'SGL' there"):
            calibrate(model, processor, samples, host=HOST, checkpoint=path)

    def test_what_cannot_be_fitted_is_named(self, model: Any, processor: Any) -> None:
        found = calibrate_guide(model, processor, make_samples(2), max_new_tokens=1)
        flat = replace(found, sums=(0,) * N, squares=(0,) * N)
        with pytest.raises(ScoreError, match="The attention of the guiding model: "):
            HostCalibration((flat,)).fit()

    def test_samples_without_an_image_are_bad(
        self, model: Any, processor: Any, samples: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build = measuring.build_inputs

        def without(processor: Any, given: Any, *others: Any) -> Any:
            inputs = build(processor, given, *others)
            for row, sample in enumerate(given):
                if sample.id == samples[1].id:
                    ids = inputs["input_ids"]
                    ids[row] = ids[row].masked_fill(ids[row] == IMAGE, 7)
                    inputs["pixel_values"] = inputs["pixel_values"][
                        [i for i in range(len(given)) if i != row]
                    ]
            return inputs

        monkeypatch.setattr(measuring, "build_inputs", without)
        found = calibrate_guide(model, processor, samples[:4], max_new_tokens=1, max_bad=0.5)
        assert [bad.id for bad in found.bad] == [samples[1].id]
        assert found.count == 3
