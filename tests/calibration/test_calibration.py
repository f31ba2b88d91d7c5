"""Calibration against attention computed in full, and against itself cut up and put together."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import pore
from helpers.calibrations import (
    HOSTS,
    LAYERS,
    TEMPLATE,
    K,
    Stepwise,
    broken_after,
    make_processor,
    make_samples,
    run,
)
from helpers.models import IMAGE, SIDE, N, batch, prompt, tiny_llava
from pore.bias.position_bias import PositionBias
from pore.calibration import passes as module
from pore.calibration import sums
from pore.calibration.calibrating import attention_rows, calibrate, calibrate_guide
from pore.calibration.host import HostCalibration
from pore.calibration.sums import Calibration
from pore.data.prompts import build_inputs, processor_settings, prompt_template
from pore.data.samples import Sample
from pore.errors import (
    BudgetError,
    CalibrationError,
    InputError,
    ModelStateError,
    ScoreError,
    UnsupportedModelError,
)
from pore.evaluation.reweighting import reweighted
from pore.families.registry import shape_of

HOST = pore.FastV(keep=1, layer=K)


def same(one: Calibration, other: Calibration) -> bool:
    """Whether two calibrations agree, but for the last bits that a batch's make-up decides."""
    return (
        (one.count, one.seen, one.bad, one.passes)
        == (other.count, other.seen, other.bad, other.passes)
        and torch.allclose(one.mean, other.mean, rtol=1e-10, atol=0)
        and torch.allclose(one.std, other.std, rtol=1e-8, atol=0)
    )


# -- what is measured ---------------------------------------------------------------------------


def eager_in_float64(
    module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any
) -> Any:
    """Eager attention whose softmax stays in float64; transformers' own goes through float32."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.transpose(2, 3) * kwargs["scaling"]
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def tiny_eager() -> LlavaForConditionalGeneration:
    """With eager attention in the decoder; the tower keeps SDPA, which is in float64."""
    model = tiny_llava(layers=LAYERS, attention="eager")
    model.model.vision_tower.set_attn_implementation("sdpa")
    return model


@pytest.fixture(scope="module")
def truth(processor: LlavaProcessor, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """A of every sample, one at a time, from the whole attention matrix of eager attention."""
    eager = tiny_eager()
    rows: dict[str, list[torch.Tensor]] = {"prompt": [], "visual": []}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(modeling_llama, "eager_attention_forward", eager_in_float64)
        for sample in samples:
            inputs = build_inputs(processor, [sample], dtype=torch.float64)
            weights = eager(**inputs, output_attentions=True).attentions[K - 1]
            visual = weights[0, :, -1, inputs["input_ids"][0] == IMAGE]
            rows["prompt"].append(visual.mean(0))
            rows["visual"].append((visual / visual.sum(-1, keepdim=True)).mean(0))
    return {name: torch.stack(found) for name, found in rows.items()}


@pytest.mark.parametrize("normalize", ["prompt", "visual"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_full_attention(
    truth: dict[str, torch.Tensor],
    processor: LlavaProcessor,
    samples: list[Sample],
    normalize: Any,
    attention: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if attention == "eager":
        monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager_in_float64)
    model = tiny_eager() if attention == "eager" else tiny_llava(layers=LAYERS)
    # The eager stand-in knows no padding, so it gets one sample at a time.
    found = run(
        model, processor, samples, normalize=normalize, batch_size=1 if attention == "eager" else 4
    )
    rows = truth[normalize]
    assert found.count == found.seen == len(samples)
    assert found.mean.dtype == torch.float64
    torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.std, rows.std(0), rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(found.sem, rows.std(0) / len(rows) ** 0.5, rtol=1e-8, atol=1e-14)


def test_several_images_in_a_prompt_are_several_rows(model: LlavaForConditionalGeneration) -> None:
    inputs = batch([prompt(3, 2, 4, seed=1), prompt(5, 1, 2, seed=2)])
    layout, (rows,) = attention_rows(model, inputs, HOST)
    assert rows.shape == (3, N)
    assert [(i.row, i.index) for i in layout.images] == [(0, 0), (0, 1), (1, 0)]
    alone = {"input_ids": inputs["input_ids"][:1], "pixel_values": inputs["pixel_values"][:2]}
    torch.testing.assert_close(rows[:2], attention_rows(model, alone, HOST)[1][0])


@pytest.mark.parametrize("size", [1, 5, 100])
def test_batch_size_does_not_matter(
    model: Any, processor: Any, samples: list[Sample], size: int
) -> None:
    assert same(
        run(model, processor, samples, batch_size=size),
        run(model, processor, samples, batch_size=3),
    )


def test_order_does_not_matter(model: Any, processor: Any, samples: list[Sample]) -> None:
    one = run(model, processor, samples)
    other = run(model, processor, samples[::-1])
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-12, atol=0)


def test_bfloat16_is_summed_beyond_its_precision(processor: Any, samples: list[Sample]) -> None:
    model = tiny_llava(layers=LAYERS, dtype=torch.bfloat16)
    found = run(model, processor, samples)
    assert found.dtype == "bfloat16"
    total = found.mean.sum().item()
    assert 0 < total < 1


def test_what_runs_and_what_does_not(model: Any, processor: Any, samples: list[Sample]) -> None:
    ran: list[nn.Module] = []
    hooks = [m.register_forward_pre_hook(lambda m, _: ran.append(m)) for m in model.modules()]
    try:
        run(model, processor, samples[:2], batch_size=2)
    finally:
        for hook in hooks:
            hook.remove()
    decoder = model.model.language_model
    last = decoder.layers[K - 1]
    for whole in (model.model.vision_tower.encoder.layers[-1], model.model.multi_modal_projector):
        assert ran.count(whole) == 1
    for layer in decoder.layers[: K - 1]:
        assert ran.count(layer) == ran.count(layer.mlp) == ran.count(layer.self_attn.o_proj) == 1
    assert ran.count(last.self_attn.k_proj) == 1
    for idle in (last.self_attn.o_proj, last.mlp, *decoder.layers[K:], decoder.norm, model.lm_head):
        assert idle not in ran
    assert model not in ran


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


@pytest.mark.parametrize("values", [[0.0, 1.0, 0.5, 2**-60], [3.75, 2**20 + 2**-30, 1e-300, 2**30]])
def test_units_are_rounded_once(values: list[float]) -> None:
    units = sums._units(np.array([values]))[0]
    assert [int(u) for u in units] == [round(Fraction(v) * 2**62) for v in values]


@pytest.mark.parametrize("scale", [-1.0, 1e12])
def test_what_is_no_attention_is_refused(
    model: Any, processor: Any, samples: list[Sample], scale: float
) -> None:
    with pytest.raises(CalibrationError, match="What Stepwise reads is no attention"):
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
    with pytest.raises(CalibrationError, match="of different hosts"):
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
    with pytest.raises(CalibrationError, match="up to FastV; leave normalize away"):
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
        lambda d: d.update(stages=d["stages"] * 1000),
        lambda d: d.update(version=2),
        lambda d: d.update(more=1),
        lambda d: d["stages"][0].update(seen=9),
    ],
)
def test_damaged_host_files_are_refused(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path, damage: Any
) -> None:
    found = calibrate(model, processor, samples[:2], host=Stepwise())
    file = found.save(tmp_path / "c.json")
    assert HostCalibration.load(file) == found
    document = json.loads(file.read_text())
    damage(document)
    file.write_text(json.dumps(document))
    with pytest.raises(CalibrationError, match=r"c\.json is no calibration"):
        HostCalibration.load(file)


# -- the model afterwards -----------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        name: (
            m.training,
            sorted(vars(m)),
            id(getattr(m, "config", None)),
            len(m._forward_hooks) + len(m._forward_pre_hooks),
        )
        for name, m in model.named_modules()
    } | {"registry": sorted(ALL_ATTENTION_FUNCTIONS._global_mapping)}


def test_leaves_the_model_alone(processor: Any, samples: list[Sample]) -> None:
    model = tiny_llava(layers=LAYERS).train()
    model.model.vision_tower.eval()
    # The first forward of any model leaves transformers' own hooks in the tower.
    model(**build_inputs(processor, samples[:1], dtype=torch.float64))
    before = snapshot(model)
    run(model, processor, samples)
    assert snapshot(model) == before
    with pytest.raises(RuntimeError, match="disk"):
        run(model, processor, broken_after(samples, 6, RuntimeError("disk on fire")))
    assert snapshot(model) == before
    calls = iter(range(100))

    def fail(*_: object) -> None:
        if next(calls) == 1:
            raise RuntimeError("out of memory")

    hook = model.model.language_model.layers[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(model, processor, samples)
    hook.remove()
    assert snapshot(model) == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_offloaded_weights_stay_offloaded(processor: Any, samples: list[Sample]) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = run(tiny_llava(layers=LAYERS), processor, samples)
    model = tiny_llava(layers=LAYERS)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert same(run(model, processor, samples), plain)
    assert all(p.device.type == "meta" for p in model.parameters())


# -- interruptions ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("disk on fire")])
@pytest.mark.parametrize("stops", [[1], [5], [9, 12], [3, 4, 8, 13]])
def test_resumed_equals_uninterrupted(
    model: Any,
    processor: Any,
    samples: list[Sample],
    tmp_path: Path,
    stops: list[int],
    error: BaseException,
) -> None:
    whole = run(model, processor, samples)
    file = tmp_path / "state.json"
    for stop in stops:
        with pytest.raises(type(error)):
            run(
                model,
                processor,
                broken_after(samples, stop, error),
                checkpoint=file,
                every=4,
            )
        done = Calibration.load(file).seen if file.exists() else 0
        assert done == stop // 4 * 4
    resumed = run(model, processor, samples, checkpoint=file, every=4)
    assert resumed == whole
    assert Calibration.load(file) == whole
    # Once done, nothing is left to run.
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(module, "_measure")
        assert run(model, processor, samples, checkpoint=file, every=4) == whole


def test_killed_in_the_middle_of_a_forward(
    model: Any,
    processor: Any,
    samples: list[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "state.json"
    measure = module._measure
    calls = iter(range(100))

    def interrupted(*args: Any) -> Any:
        found = measure(*args)
        if next(calls) == 2:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(module, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"after 8 samples.*state\.json.*same call again"):
        run(model, processor, samples, checkpoint=file, every=100)
    monkeypatch.undo()
    assert run(model, processor, samples, checkpoint=file) == run(model, processor, samples)


def test_interruption_without_checkpoint_says_so(
    model: Any, processor: Any, samples: list[Sample]
) -> None:
    with pytest.raises(KeyboardInterrupt, match="after 4 samples; nothing was kept"):
        run(model, processor, broken_after(samples, 6, KeyboardInterrupt()))


def test_a_higher_limit_goes_on(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path
) -> None:
    file = tmp_path / "state.json"
    assert run(model, processor, samples, checkpoint=file, limit=5).seen == 5
    assert same(
        run(model, processor, iter(samples), checkpoint=file), run(model, processor, samples)
    )


def test_checkpoint_of_other_conditions_is_refused(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path
) -> None:
    file = tmp_path / "state.json"
    run(model, processor, samples, checkpoint=file, limit=4)
    with pytest.raises(CalibrationError, match=r"layer is 2 here and 3 there.*delete"):
        run(model, processor, samples, 2, checkpoint=file)
    with pytest.raises(CalibrationError, match="normalize is 'visual' here"):
        run(model, processor, samples, checkpoint=file, normalize="visual")
    with pytest.raises(CalibrationError, match=r"processor is .* here"):
        run(model, make_processor(do_center_crop=False), samples, checkpoint=file)
    with pytest.raises(CalibrationError, match="dtype is 'float32' here"):
        run(tiny_llava(dtype=torch.float32), processor, samples, checkpoint=file)
    for others in (samples[1:], samples[:3], [replace(samples[0], question="w7"), *samples[1:]]):
        with pytest.raises(CalibrationError, match="not the first ones of this call"):
            run(model, processor, others, checkpoint=file)
    file.write_text(file.read_text()[:100])
    with pytest.raises(CalibrationError, match=r"damaged.*delete"):
        run(model, processor, samples, checkpoint=file)


# -- shards -------------------------------------------------------------------------------------


def test_merged_shards_equal_the_whole(model: Any, processor: Any, samples: list[Sample]) -> None:
    whole = run(model, processor, samples, batch_size=1)
    parts = [
        run(model, processor, samples[i::3], batch_size=1, source=f"shard {i}") for i in range(3)
    ]
    a, b, c = parts
    merged = a.merge(b).merge(c)
    assert merged == c.merge(a.merge(b)) == b.merge(c).merge(a)
    # Not only close: integers add up to the same in any order.
    assert (merged.sums, merged.squares) == (whole.sums, whole.squares)
    assert torch.equal(merged.mean, whole.mean)
    assert torch.equal(merged.fit().values, whole.fit().values)
    assert merged.count == 13
    assert merged.provenance.source == "shard 0; shard 1; shard 2"


def test_merging_what_does_not_go_together_is_refused(
    model: Any, processor: Any, samples: list[Sample], tmp_path: Path
) -> None:
    one = run(model, processor, samples[:4])
    with pytest.raises(CalibrationError, match="same samples, which would count twice"):
        one.merge(run(model, processor, samples[:4]))
    with pytest.raises(CalibrationError, match="layer is 3 here and 2 there"):
        one.merge(run(model, processor, samples[4:8], 2))
    merged = one.merge(run(model, processor, samples[4:8]))
    with pytest.raises(CalibrationError, match="not the first ones"):
        run(model, processor, samples, checkpoint=merged.save(tmp_path / "merged.json"))


# -- bad samples --------------------------------------------------------------------------------


def spoil(samples: list[Sample], tmp_path: Path) -> list[Sample]:
    """Three bad samples among the good, one of them found only by the processor."""
    truncated = tmp_path / "truncated.png"
    samples[0].load_image().save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:600])
    found = list(samples)
    found[1] = replace(samples[1], image=tmp_path / "missing.png")
    found[2] = replace(samples[2], image=truncated)
    found[6] = replace(samples[6], question="what <image> is")
    return found


def test_bad_samples_are_skipped_and_counted(
    model: Any,
    processor: Any,
    samples: list[Sample],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "pore.calibration.sums"):
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

    monkeypatch.setattr(module, "build_inputs", spoilt)


def test_nan_throughout_is_an_error(
    model: Any, processor: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_pixels(monkeypatch, None)
    with pytest.raises(ScoreError, match="layer 2 is NaN or infinite from the start"):
        run(model, processor, samples, max_bad=1)


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, LAYERS, -1, True, 1.5])
def test_layer_out_of_range(model: Any, processor: Any, samples: list[Sample], layer: Any) -> None:
    with pytest.raises(BudgetError, match="cannot be the first pruned layer"):
        run(model, processor, samples, layer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"every": 0}, "every"),
        ({"limit": -1}, "limit"),
        ({"max_bad": float("nan")}, "max_bad"),
        ({"normalize": "row"}, "normalize"),
    ],
)
def test_arguments_out_of_range(
    model: Any, processor: Any, samples: list[Sample], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(pore.PoreError, match=message):
        run(model, processor, samples, **settings)


def test_pruned_model_is_refused(model: Any, processor: Any, samples: list[Sample]) -> None:
    with (
        pore.FastV(keep=4, layer=2)(model),
        pytest.raises(ModelStateError, match="already pruned by FastV"),
    ):
        run(model, processor, samples)


def test_text_only_model_is_refused(processor: Any, samples: list[Sample]) -> None:
    from transformers import LlamaForCausalLM

    config = tiny_llava().config.text_config
    with pytest.raises(UnsupportedModelError, match="no vision tower in its config"):
        run(LlamaForCausalLM(config), processor, samples)


def test_processor_without_template_is_refused(model: Any, samples: list[Sample]) -> None:
    processor = make_processor()
    processor.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        run(model, processor, samples)


def test_prompts_that_give_nothing_to_measure_are_refused(model: Any) -> None:
    with pytest.raises(InputError, match="sample 1 has no image"):
        attention_rows(model, batch([prompt(3, 1, 4), prompt(3, 0, 20)]), HOST)
    with pytest.raises(InputError, match="ends with a visual token"):
        attention_rows(model, batch([prompt(3, 1, 0)]), HOST)


# -- result and file ----------------------------------------------------------------------------


def test_fit_carries_where_it_comes_from(model: Any, processor: Any, samples: list[Sample]) -> None:
    found = run(model, processor, samples, normalize="visual", source="noise")
    bias = found.fit("empirical")
    assert len(bias) == len(found) == N
    assert bias.grid == (SIDE, SIDE)
    torch.testing.assert_close(bias.values, found.mean / found.mean.mean())
    origin = bias.provenance
    assert (origin.layer, origin.normalize, origin.samples) == (K, "visual", 13)
    assert origin.source == "noise"
    assert origin.template == "USER: <image> {question} ASSISTANT:"
    assert origin.processor is not None
    assert origin.processor["size"] == {"height": 32, "width": 32}
    assert pore.PositionBias.from_json(bias.to_json()) == bias
    bias.check(n=N, layer=K, normalize="visual", processor=processor_settings(processor))
    with (
        pore.FastV(keep=4, layer=K, normalize="visual", reweight=bias)(model) as pruned,
        torch.no_grad(),
    ):
        model(**build_inputs(processor, samples[:2], dtype=torch.float64))
    assert "4" in str(pruned.report)


def test_band_covers_the_mean(model: Any, processor: Any, samples: list[Sample]) -> None:
    found = run(model, processor, samples)
    low, high = found.band(0.95)
    torch.testing.assert_close((high - low) / 2, 1.959964 * found.sem)
    torch.testing.assert_close((high + low) / 2, found.mean)
    with pytest.raises(CalibrationError, match="between 0 and 1"):
        found.band(95)
    assert run(model, processor, samples[:1]).std.isnan().all()


def test_same_prompts_for_one_and_many(processor: Any, samples: list[Sample]) -> None:
    many = build_inputs(processor, samples[:4])
    assert (many["attention_mask"][:, -1] == 1).all()
    for i, sample in enumerate(samples[:4]):
        one = build_inputs(processor, [sample])
        length = one["input_ids"].shape[1]
        assert torch.equal(many["input_ids"][i, -length:], one["input_ids"][0])
        assert (one["input_ids"] == 1).sum() == 1
        assert torch.equal(many["pixel_values"][i], one["pixel_values"][0])
    without = build_inputs(processor, [replace(samples[0], image=None), samples[1]])
    assert len(without["pixel_values"]) == 1
    assert (without["input_ids"][0] != IMAGE).all()


def test_template_with_its_own_start_token(samples: list[Sample]) -> None:
    processor = make_processor()
    processor.chat_template = "<s> " + TEMPLATE
    assert (build_inputs(processor, samples[:1])["input_ids"] == 1).sum() == 1
    assert prompt_template(processor).startswith("<s> USER:")


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


def test_progress_is_for_terminals(
    model: Any,
    processor: Any,
    samples: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(model, processor, samples)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    run(model, processor, samples)
    shown = capsys.readouterr().err
    assert "Calibrating" in shown
    assert "13/13" in shown
    assert "samples/s" in shown
    run(model, processor, samples, progress=False)
    assert capsys.readouterr() == ("", "")


# -- the model that guides SGL --------------------------------------------------------------------


class TestGuide:
    def test_it_is_the_mean_importance(self, model: Any, processor: Any, samples: Any) -> None:
        found = calibrate_guide(model, processor, samples, max_new_tokens=3, batch_size=4)
        total = torch.zeros(N, dtype=torch.float64)
        for sample in samples:
            inputs = build_inputs(processor, [sample], torch.device("cpu"), torch.float64)
            guide = pore.guide(model, inputs, max_new_tokens=3)
            total += guide.importance[0]
        torch.testing.assert_close(found.mean, total / 13, rtol=1e-9, atol=0)
        assert found.count == 13
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
        with pytest.raises(CalibrationError, match="with answers of another length"):
            go(samples, longest=3)
        whole = calibrate_guide(model, processor, samples, max_new_tokens=2, batch_size=4)
        assert go(samples) == whole == Calibration.load(path)
        with pytest.raises(CalibrationError, match="host is 'FastV' here and 'SGL' there"):
            calibrate(model, processor, samples, host=HOST, checkpoint=path)

    def test_what_cannot_be_fitted_is_named(self, model: Any, processor: Any) -> None:
        found = calibrate_guide(model, processor, make_samples(2), max_new_tokens=1)
        flat = replace(found, sums=(0,) * N, squares=(0,) * N)
        with pytest.raises(ScoreError, match="What is read of the model that guides: "):
            HostCalibration((flat,)).fit()

    def test_samples_without_an_image_are_bad(
        self, model: Any, processor: Any, samples: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build = module.build_inputs

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

        monkeypatch.setattr(module, "build_inputs", without)
        found = calibrate_guide(model, processor, samples[:4], max_new_tokens=1, max_bad=0.5)
        assert [bad.id for bad in found.bad] == [samples[1].id]
        assert found.count == 3
