"""Asking, against plain `generate`; P by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pore
from helpers.calibrations import Stepwise
from pore.bias.position_bias import PositionBias
from pore.data.prompts import build_inputs
from pore.data.samples import Sample
from pore.errors import InputError
from pore.evaluation.batches import Batches
from pore.evaluation.differences import compare
from pore.evaluation.outcome import Answer, Outcome
from pore.evaluation.records import FIELDS
from pore.evaluation.reweighting import load_bias, reweighted, rope_bias
from pore.evaluation.running import evaluate, time_prefill
from pore.evaluation.statistics import wilson

PRUNERS = [None, pore.FastV(keep=4), pore.Random(keep=0.5, seed=3), pore.FasterVLM(keep=4)]


@pytest.mark.parametrize("pruner", PRUNERS)
def test_equals_plain_generate(
    model: Any, processor: Any, samples: list[Sample], pruner: pore.Pruner | None
) -> None:
    found = evaluate(model, processor, samples, pruner, batch_size=3, max_new_tokens=4)
    inputs = build_inputs(processor, samples)
    with torch.inference_mode():
        if pruner is None:
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        else:
            with pruner(model) as run:
                tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    written = [t.strip() for t in processor.batch_decode(new, skip_special_tokens=True)]
    assert [answer.given for answer in found.answers] == written
    if pruner is not None:
        kept = [tuple(image.kept for image in sample.images) for sample in run.report]
        assert [answer.kept for answer in found.answers] == kept
        assert [answer.flops for answer in found.answers] == [s.flops for s in run.report]
    else:
        with pore.FastV(keep=1.0)(model) as run, torch.inference_mode():
            model(**inputs)
        assert [a.flops for a in found.answers] == [s.unpruned_flops for s in run.report]
        assert found.tokens_after == 16


def test_right_answers_count(model: Any, processor: Any, samples: list[Sample]) -> None:
    first = evaluate(model, processor, samples, max_new_tokens=3)
    told = [
        replace(sample, answer=answer.given if i else "no such answer")
        for i, (sample, answer) in enumerate(zip(samples, first.answers, strict=True))
    ]
    steps: list[int] = []
    found = evaluate(model, processor, told, max_new_tokens=3, batch_size=4, progress=steps.append)
    assert found.right == (False, True, True, True, True, True, True)
    assert steps == [4, 3]
    assert found.accuracy == pytest.approx(6 / 7)
    record = found.record()
    assert tuple(record) == FIELDS
    assert record["accuracy_by_kind"] == {"color": pytest.approx(3 / 4), "shape": 1.0}
    assert record["accuracy_by_third"] == {"middle": 1.0, "top": 1.0, "bottom": 1.0}
    assert record["ci"] == list(wilson(6, 7))
    assert (record["method"], record["keep"], record["layer"]) == ("unpruned", 1.0, None)
    difference = compare(first, found)
    assert (difference.paired.gained, difference.paired.lost) == (6, 0)


@pytest.mark.slow
def test_batches_are_made_once_within_their_memory(
    model: Any, processor: Any, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(*args: Any) -> Any:
        made.append(1)
        return build_inputs(*args)

    monkeypatch.setattr("pore.evaluation.batches.build_inputs", counted)
    for memory, times in ((1 << 20, 2), (0, 4)):
        made.clear()
        batches = Batches(model, processor, samples, batch_size=4, memory=memory)
        outcomes = [evaluate(model, processor, batches, pore.FastV(keep=4)) for _ in range(2)]
        assert outcomes[0] == outcomes[1]
        assert len(made) == times


def test_padding_is_read_off_pixels(processor: Any, samples: list[Sample], model: Any) -> None:
    pruner = pore.FastV(keep=4, suppress_padding=0.5)
    found = evaluate(model, processor, samples, pruner, max_new_tokens=2)
    assert [len(answer.kept[0]) for answer in found.answers] == [4] * 7


def test_what_cannot_be_asked(model: Any, processor: Any, samples: list[Sample]) -> None:
    with pytest.raises(InputError, match="no samples"):
        evaluate(model, processor, [])
    with pytest.raises(InputError, match="'0/1' has no answer"):
        evaluate(model, processor, [samples[0], replace(samples[1], answer=None)])
    with pytest.raises(InputError, match="at least 1 sample"):
        evaluate(model, processor, samples, batch_size=0)


def test_other_questions_are_not_compared() -> None:
    one, other = (
        Outcome(None, (Answer("a", q, "x", "x", True, None, None, ((0,),), 1),)) for q in "pq"
    )
    with pytest.raises(InputError, match="same questions"):
        compare(one, other)


def test_timing(model: Any, processor: Any, samples: list[Sample]) -> None:
    steps: list[int] = []
    batches = Batches(model, processor, samples, batch_size=3)
    times = time_prefill(model, batches, PRUNERS[:2], count=2, rounds=2, progress=steps.append)
    assert len(times) == 2
    assert [len(one.samples) for one in times] == [2, 2]
    assert all(0 < one.q1 <= one.median <= one.q3 for one in times)
    assert steps == [6] * 6


def test_bias_by_name(tmp_path: Path) -> None:
    bias = PositionBias.exponential(0.1, 16)
    assert load_bias(str(bias.save(tmp_path / "p.json"))) == (bias,)
    (himap,) = load_bias("published:himap/vqav2")
    assert len(himap) == 576
    with pytest.raises(InputError, match="published:himap/vqav2"):
        load_bias("published:himap")


def test_biases_go_to_their_stages() -> None:
    one, other = (PositionBias.exponential(rate, 16) for rate in (0.1, 0.2))
    assert reweighted(pore.FastV(keep=4), [one]) == pore.FastV(keep=4, reweight=one)
    assert reweighted(Stepwise(), [one]) == Stepwise(reweight=one)
    assert reweighted(Stepwise(), (one, other)) == Stepwise(reweight=(one, other))
    with pytest.raises(InputError, match="at 2 places, and there are biases for 3"):
        reweighted(Stepwise(), [one, one, other])
    with pytest.raises(InputError, match="Random does not rank"):
        reweighted(pore.Random(keep=4), [one])


def test_rope_bias_is_that_of_the_model(model: Any, processor: Any, samples: list[Sample]) -> None:
    found = rope_bias(model, processor, samples)
    inputs = build_inputs(processor, samples)["input_ids"]
    after = sorted(len(row) - 1 - int((row == 90).nonzero()[-1]) for row in inputs)
    assert found.parameters["text_tokens"] == after[3]
    assert found == PositionBias.rope(16, head_dim=8, text_tokens=after[3], grid=(4, 4))
    with pytest.raises(InputError, match="needs an image in the samples"):
        rope_bias(model, processor, [replace(samples[0], image=None)])
