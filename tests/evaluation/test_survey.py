"""All methods at once: what is asked, and what is written of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pore
from helpers.calibrations import make_processor, make_samples
from helpers.models import tiny_llava
from helpers.survey import SETTINGS, labels, run_survey
from pore.errors import InputError, ProfileError
from pore.evaluation import survey
from pore.evaluation.differences import compare
from pore.evaluation.files import read_records
from pore.evaluation.guided import Guiding
from pore.evaluation.hosts import fitted
from pore.evaluation.records import FIELDS
from pore.evaluation.results import SurveySettings
from pore.evaluation.running import evaluate
from pore.evaluation.sizes import ImageSizes

pytestmark = pytest.mark.usefixtures("registry")


SIXTEEN = ImageSizes(16, 16, 16, any_size=False)


def itself(model: Any) -> Guiding:
    return Guiding(model, None, max_new_tokens=3, itself=True)


def test_every_method_that_is_there_is_asked_or_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # all of them
    model = tiny_llava(layers=8, tower_layers=4)
    planned, left_out = survey.lineup(model, SurveySettings(seed=7), itself(model), SIXTEEN)
    assert sorted({keep for keep, _ in planned}) == [2, 4, 5]
    asked = {pruner.name for _, pruner in planned} | {one.method for one in left_out}
    assert {n for n, kind in pore.methods().items() if kind.__module__.startswith("pore.")} <= asked
    assert all(one.reason for one in left_out)
    for keep, pruner in planned:
        counts = pruner.counts(16, 8)
        assert counts[-1] == keep or isinstance(pruner, pore.Downsample)
        assert getattr(pruner, "seed", 7) == 7


def test_budgets_by_the_mean_over_layers() -> None:
    model = tiny_llava(layers=8)
    settings = SurveySettings(keeps=(8, 3), average=True)
    planned, left_out = survey.lineup(model, settings, itself(model), SIXTEEN)
    for keep, pruner in planned:
        assert sum(pruner.counts(16, 8)) / 8 == pytest.approx(keep, abs=0.5)
    reasons = {(one.method, one.keep): one.reason for one in left_out}
    assert "cannot average 3 of 16" in reasons["FastV", 3]
    assert "needs more than a model" in reasons["Scored", 8]


@pytest.mark.slow
def test_a_mean_is_named_as_one(checkpoint: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, keeps=(12,), average=True, timing=False)
    result = run_survey(checkpoint, tmp_path, settings=settings)
    assert {record["keep"] for record in result.records} == {1.0, "mean 12"}
    by_name = {
        label[:2]: r for label, r in zip(labels(result.records), result.records, strict=True)
    }
    assert by_name["FastV", "exponential"]["mean_tokens"] == pytest.approx(12, abs=0.5)
    assert "Budgets are visual tokens of 16, their mean" in result.report.read_text()
    assert "mean 12" in result.report.read_text()


@pytest.mark.slow
def test_hosts_are_asked_with_and_without(surveyed: Any) -> None:
    result, _ = surveyed
    hosts = [("FastV", None), ("FastV", "exponential"), ("PyramidDrop", None)]
    hosts = [*hosts, ("PyramidDrop", "exponential"), ("Random", None)]
    hosts = [*hosts, ("SGL", None), ("SGL", "exponential")]
    plain = [("Downsample", None), *hosts[:2], ("FasterVLM", None), *hosts[2:], ("Fussy", None)]
    expected = [("unpruned", None, 1.0), *((*each, 8) for each in plain)]
    expected += [(*each, 4) for each in plain[:-1]]
    records = read_records(result.report.parent / "results.json")
    assert sorted(map(str, labels(records))) == sorted(map(str, expected))
    assert records == json.loads(json.dumps(result.records))
    assert all(tuple(record) == FIELDS and record["prefill_ms"] > 0 for record in records)
    by_name = dict(zip(labels(records), records, strict=True))
    assert by_name["Downsample", None, 8]["tokens_after"] == 9
    assert by_name["FastV", None, 4]["mean_tokens"] == pytest.approx((2 * 16 + 3 * 4) / 5)
    assert by_name["PyramidDrop", None, 4]["looks_at"] == [1, 2, 3]
    assert [by_name[name, None, 8]["acts_in"] for name in ("FasterVLM", "FastV", "Downsample")] == [
        "tower",
        "decoder",
        "embeddings",
    ]


@pytest.mark.slow
def test_what_fails_on_the_way_is_left_out(surveyed: Any) -> None:
    reasons = {(one.method, one.keep): one.reason for one in surveyed[0].left_out}
    assert reasons["Fussy", 4] == "not four"
    assert reasons["Scored", 8] == "it needs more than a model to be set up"
    assert len(reasons) == 3


@pytest.mark.slow
def test_differences_are_of_hosts_with_themselves(surveyed: Any) -> None:
    result, _ = surveyed
    records = json.loads((result.report.parent / "differences.json").read_text())["differences"]
    thirds = list(dict.fromkeys(record["third"] for record in records))
    assert thirds[0] is None
    assert {"top", "middle", "bottom"} >= set(thirds[1:])
    assert len(records) == 2 * 3 * len(thirds)
    asked = {third: sum(d["n"] for d in records if d["third"] == third) for third in thirds}
    assert asked[None] == 6 * 9
    for difference in result.differences:
        assert difference.first.method == difference.second.method
        assert (difference.first.reweight, difference.second.reweight) == (None, "exponential")
        assert difference.first.keep == difference.second.keep


@pytest.mark.slow
def test_biases_are_measured_once_for_all_budgets(surveyed: Any) -> None:
    result, _ = surveyed
    folder = result.report.parent
    fastv, pyramiddrop, sgl = sorted(result.biases)
    assert (fastv, pyramiddrop) == ("fastv-1", "pyramiddrop-1-2-3")
    assert re.fullmatch("sgl-[0-9a-f]{8}", sgl)
    for kind in ("calibrations", "profiles"):
        names = {path.name for path in (folder / kind).iterdir()}
        assert names == {f"{name}.json" for name in (fastv, pyramiddrop, sgl)}
    pyramid = pore.HostCalibration.load(folder / "calibrations" / "pyramiddrop-1-2-3.json")
    assert [stage.count for stage in pyramid.stages] == [6, 6, 6]
    assert result.biases["pyramiddrop-1-2-3"] == pyramid.fit()


@pytest.mark.slow
def test_a_form_that_does_not_fit_gives_way(surveyed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = surveyed
    path = result.report.parent / "calibrations" / "fastv-1.json"
    measured = pore.Calibration.load(path)
    fit, refused = pore.Calibration.fit, {"exponential"}

    def picky(self: Any, kind: Any = "exponential", mean: Any = "arithmetic") -> Any:
        if kind in refused:
            raise ProfileError(f"no {kind}")
        return fit(self, kind, mean)

    monkeypatch.setattr(pore.Calibration, "fit", picky)
    assert fitted(measured, "exponential").kind == "spline"
    with pytest.raises(ProfileError, match="The attention of decoder layer 1: no exponential"):
        pore.HostCalibration((measured,)).fit()
    refused.add("spline")
    assert fitted(measured, "exponential").kind == "empirical"
    refused.add("empirical")
    with pytest.raises(ProfileError, match="no empirical"):
        fitted(measured, "exponential")


@pytest.mark.slow
def test_progress_comes_to_its_end(surveyed: Any) -> None:
    shares = [share for _, share in surveyed[1]]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert shares[-2] > 0.9


@pytest.mark.slow
def test_a_third_that_was_not_asked_about_is_refused(surveyed: Any) -> None:
    one = surveyed[0].outcomes[0]
    with pytest.raises(InputError, match="Cannot pair 0"):
        compare(one, one, third="edge")


def test_numbers_of_tokens_count_what_stands_for_no_patch() -> None:

    model = tiny_llava(dtype=torch.float32, tower_layers=4)
    processor = make_processor(do_center_crop=False)
    pruner = pore.VisionZip(keep=6)
    outcome = evaluate(model, processor, make_samples(3), pruner, max_new_tokens=1)
    assert outcome.tokens_after == outcome.mean_tokens == 6
    assert sum(answer.extra for answer in outcome.answers) > 0
    assert np.isfinite(outcome.flops)
