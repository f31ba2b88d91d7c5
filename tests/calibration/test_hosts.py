"""Calibration for a host method: all of its stages in one pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

import pore
from helpers.calibrations import (
    HOST,
    HOSTS,
    LAYERS,
    K,
    Stepwise,
    broken_after,
    eager_in_float64,
    run,
    snapshot,
    tiny_eager,
)
from helpers.models import IMAGE, tiny_llava
from pore._saved import stages
from pore.bias.position_bias import PositionBias
from pore.calibration.calibrating import calibrate
from pore.calibration.host import HostCalibration
from pore.calibration.sums import Calibration
from pore.data.prompts import build_inputs
from pore.data.samples import Sample
from pore.errors import BudgetError, CalibrationError, InputError, ScoreError
from pore.evaluation.reweighting import reweighted
from pore.families.registry import shape_of


def test_host_fastv_is_the_layer(model: Any, processor: Any, samples: list[Sample]) -> None:
    for normalize in ("prompt", "visual"):
        host = pore.FastV(
            keep=3, layer=K, normalize=normalize, reweight=PositionBias.exponential(0.1, 5)
        )
        found = calibrate(model, processor, samples, host=host, batch_size=4)
        assert found == HostCalibration((run(model, processor, samples, normalize=normalize),))
        assert found.stages[0].provenance.host == "FastV"


def test_every_stage_of_a_host_equals_full_attention(processor: Any, samples: list[Sample]) -> None:
    rows: list[list[torch.Tensor]] = [[], []]
    eager = tiny_eager()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(modeling_llama, "eager_attention_forward", eager_in_float64)
        for sample in samples:
            inputs = build_inputs(processor, [sample], dtype=torch.float64)
            weights = eager(**inputs, output_attentions=True).attentions
            visual = inputs["input_ids"][0] == IMAGE
            rows[0].append(weights[K - 1][0, :, -2:, visual].sum((0, 1)))
            here = weights[K][0, :, -1, visual]
            rows[1].append((here / here.sum(-1, keepdim=True)).mean(0))
    model = tiny_llava(layers=LAYERS)
    found = calibrate(model, processor, samples, host=Stepwise(), batch_size=4)
    assert rows[0][0].sum() > 1
    for stage, truth in zip(found.stages, map(torch.stack, rows), strict=True):
        torch.testing.assert_close(stage.mean, truth.mean(0), rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(stage.std, truth.std(0), rtol=1e-8, atol=1e-14)
    where = [(s.provenance.layer, s.provenance.normalize) for s in found.stages]
    assert where == [(K, "last two"), (K + 1, "visual")]
    biases = found.fit("spline")
    assert [bias.provenance.host for bias in biases] == ["Stepwise", "Stepwise"]
    assert [bias.provenance.samples for bias in biases] == [13, 13]


@pytest.mark.parametrize("name", HOSTS)
def test_every_host_takes_what_was_measured_for_it(
    name: str, model: Any, processor: Any, samples: list[Sample]
) -> None:
    host = pore.methods()[name].usual(4, shape_of(model.config))
    assert host is not None
    found = calibrate(model, processor, samples, host=host, batch_size=4)
    inputs = build_inputs(processor, samples[:2], dtype=torch.float64)
    biases = found.fit("empirical")
    with reweighted(host, biases)(model) as run, torch.no_grad():
        model(**inputs)
    assert [len(image.kept) + image.extra for s in run.report for image in s.images] == [4, 4]
    elsewhere = [replace(bias, provenance=replace(bias.provenance, layer=97)) for bias in biases]
    with pytest.raises(pore.PoreError, match="layer: the profile says"):
        reweighted(host, elsewhere)(model).__enter__()


def test_pyramiddrop_is_measured_on_the_layers_that_it_looks_ahead_to(
    model: Any, processor: Any, samples: list[Sample]
) -> None:
    found = calibrate(model, processor, samples, host=pore.PyramidDrop(4, (1, 2, 4)), batch_size=4)
    for layer, stage in zip((1, 2, 4), found.stages, strict=True):
        if layer + 1 < LAYERS:
            alone = run(model, processor, samples, layer + 1)
            assert (stage.sums, stage.squares) == (alone.sums, alone.squares)
        assert stage.provenance.layer == layer + 1


def test_a_host_stops_after_its_last_reading(
    model: Any, processor: Any, samples: list[Sample]
) -> None:
    before = snapshot(model)
    ran: list[nn.Module] = []
    hooks = [m.register_forward_pre_hook(lambda m, _: ran.append(m)) for m in model.modules()]
    try:
        calibrate(model, processor, samples[:2], host=Stepwise(), batch_size=2)
    finally:
        for hook in hooks:
            hook.remove()
    layers = model.model.language_model.layers
    assert ran.count(layers[K - 1].mlp) == ran.count(layers[K].self_attn.k_proj) == 1
    assert not {layers[K].mlp, layers[K].self_attn.o_proj, *layers[K + 1 :]} & set(ran)
    assert snapshot(model) == before


def test_sums_beyond_one_are_exact(model: Any, processor: Any, samples: list[Sample]) -> None:
    one = calibrate(model, processor, samples, host=Stepwise(), batch_size=4).stages[0]
    other = calibrate(model, processor, samples, host=Stepwise(scale=2.0**20), batch_size=4)
    torch.testing.assert_close(other.stages[0].mean, one.mean * 2**20, rtol=1e-15, atol=0)
    torch.testing.assert_close(other.stages[0].std, one.std * 2**20, rtol=1e-12, atol=0)
    torch.testing.assert_close(other.stages[0].fit().values, one.fit().values)


@pytest.mark.parametrize("scale", [-1.0, 1e12])
def test_what_is_no_attention_is_refused(
    model: Any, processor: Any, samples: list[Sample], scale: float
) -> None:
    with pytest.raises(CalibrationError, match="What Stepwise reads is not attention"):
        calibrate(model, processor, samples, host=Stepwise(scale=scale))


def test_a_curve_of_another_shape_is_refused(
    model: Any, processor: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stepwise, "_curve", lambda _, read: read[0].sum(-1))
    with pytest.raises(CalibrationError, match="one number for every token"):
        calibrate(model, processor, samples, host=Stepwise())


@pytest.mark.parametrize("stops", [[5], [3, 4, 8, 13]])
def test_a_host_resumes(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path, stops: list[int]
) -> None:
    def go(given: Any, host: pore.Pruner | None = None) -> HostCalibration:
        host = host or Stepwise()
        return calibrate(model, processor, given, host=host, batch_size=4, checkpoint=file, every=4)

    file = tmp_path / "state.json"
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            go(broken_after(samples, stop, KeyboardInterrupt()))
    found = go(samples)
    assert found == calibrate(model, processor, samples, host=Stepwise(), batch_size=4)
    assert HostCalibration.load(file) == found
    assert (found.seen, found.count, found.bad) == (13, 13, ())
    with pytest.raises(CalibrationError, match=r"1 stages here and 2 there.*host is 'FastV' here"):
        go(samples, HOST)
    with pytest.raises(CalibrationError, match=r"several stages.*HostCalibration"):
        Calibration.load(file)


def test_shards_of_a_host_merge(model: Any, processor: Any, samples: list[Sample]) -> None:
    whole = calibrate(model, processor, samples, host=Stepwise(), batch_size=1)
    one, other = (
        calibrate(model, processor, samples[i::2], host=Stepwise(), batch_size=1) for i in range(2)
    )
    merged = one.merge(other)
    assert merged == other.merge(one)
    assert [s.sums for s in merged.stages] == [s.sums for s in whole.stages]
    with pytest.raises(CalibrationError, match="belong to different hosts"):
        one.merge(calibrate(model, processor, samples, host=HOST))


def test_one_bad_stage_spoils_the_sample(
    model: Any, processor: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    def curve(_: Any, read: tuple[torch.Tensor, str]) -> torch.Tensor:
        return torch.where(torch.arange(len(read[0]))[:, None] == 1, torch.nan, read[0])

    monkeypatch.setattr(Stepwise, "_curve", curve)
    found = calibrate(model, processor, samples[:3], host=Stepwise(), max_bad=0.5)
    assert [one.id for one in found.bad] == ["0/1"]
    assert [stage.count for stage in found.stages] == [2, 2]
    monkeypatch.setattr(Stepwise, "_curve", lambda _, read: read[0] * torch.nan)
    with pytest.raises(ScoreError, match=f"layer {K - 1} or {K} is NaN or infinite from the start"):
        calibrate(model, processor, samples, host=Stepwise(), max_bad=1)


def test_what_is_no_host_is_refused(model: Any, processor: Any, samples: list[Sample]) -> None:
    with pytest.raises(InputError, match=r"Random does not rank.*FastV"):
        calibrate(model, processor, samples, host=pore.Random(keep=4))
    with pytest.raises(CalibrationError, match="either a layer or a host"):
        calibrate(model, processor, samples)  # type: ignore[call-overload]
    with pytest.raises(CalibrationError, match="either a layer or a host"):
        calibrate(model, processor, samples, K, host=HOST)  # type: ignore[call-overload]
    with pytest.raises(CalibrationError, match="decides what is normalised"):
        calibrate(model, processor, samples, host=HOST, normalize="visual")  # type: ignore[call-overload]
    with pytest.raises(BudgetError, match="cannot be the first pruned layer"):
        calibrate(model, processor, samples, host=replace(HOST, layer=LAYERS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepwise, "stages", lambda _: [])
        with pytest.raises(CalibrationError, match="Stepwise reads no attention"):
            calibrate(model, processor, samples, host=Stepwise())


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(stages=[]),
        lambda d: d.update(stages=[1]),
        lambda d: d.update(stages=d["stages"] * 2),
        lambda d: d.update(version=2),
        lambda d: d.update(more=1),
        lambda d: d["stages"][0].update(seen=9),
    ],
)
def test_damaged_host_files_are_refused(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path, damage: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(stages, "_MOST", 3)
    found = calibrate(model, processor, samples[:2], host=Stepwise())
    file = found.save(tmp_path / "c.json")
    assert HostCalibration.load(file) == found
    document = json.loads(file.read_text())
    damage(document)
    file.write_text(json.dumps(document))
    with pytest.raises(CalibrationError, match=r"c\.json is no calibration"):
        HostCalibration.load(file)
