"""What is measured, in which order; never how long anything takes."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import pore
from helpers.bench import AFTER, BEFORE, FASTV, KEEP, LAYERS, PROMPT, QUICK, SHORT, K, untouched
from helpers.models import N, tiny_llava
from pore.bench.clock import Clock
from pore.bench.measuring import measure, measure_calibration
from pore.cost.flops import ExtraRows, model_flops
from pore.engine import run
from pore.errors import BudgetError, InputError
from pore.families.registry import shape_of


def bytes_of(tokens: tuple[int, ...], rows: int) -> int:
    """A cache of 2 key and value heads of width 8 in float32."""
    return sum(count * rows * 2 * 2 * 8 * 4 for count in tokens)


@pytest.mark.usefixtures("quick_rates")
def test_settings_run_in_turn(model: LlavaForConditionalGeneration) -> None:
    seen: list[tuple[int, int, str]] = []
    result = measure(
        model,
        {"A": FASTV, "B": pore.Random(keep=KEEP, layer=3)},
        progress=lambda *what: seen.append(what),
        **QUICK,
    )
    turn = ["unpruned", "A", "A, attainable", "B", "B, attainable"]
    assert [name for *_, name in seen] == turn * 3
    assert [done for done, *_ in seen] == list(range(15))
    assert {total for _, total, _ in seen} == {15}
    assert [setting.name for setting in result.settings] == ["unpruned", "A", "B"]
    for setting in result.settings:
        for timing in filter(None, (setting.timing, setting.attainable)):
            assert timing.decode is not None
            for spread in (timing.prefill, timing.ttft, timing.decode):
                assert len(spread.samples) == 2
                assert min(spread.samples) > 0
            for prefill, ttft in zip(timing.prefill.samples, timing.ttft.samples, strict=True):
                assert prefill < ttft  # one is inside the other
    assert untouched(model)
    assert gc.isenabled()


@pytest.mark.usefixtures("quick_rates")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.slow
def test_lengths_and_caches_are_as_claimed(attention: str, rows: int) -> None:
    model = tiny_llava(layers=LAYERS, dtype=torch.float32, attention=attention)
    pruners = [FASTV, pore.Downsample(keep=4)]
    result = measure(model, pruners, batch_size=rows, **QUICK)
    unpruned, fastv, small = result.settings
    assert unpruned.tokens == (PROMPT,) * LAYERS
    assert fastv.tokens == (PROMPT,) * K + (SHORT,) * (LAYERS - K)
    assert small.tokens == (BEFORE + 4 + AFTER,) * LAYERS
    assert unpruned.attainable is None
    assert result.model["attention"] == attention
    for setting in result.settings:
        expected = bytes_of(setting.tokens, rows)
        assert setting.timing.cache == expected
        assert setting.timing.peak_memory is None
        if setting.attainable is not None:
            assert setting.attainable.cache == expected
    shape = shape_of(model.config)
    assert fastv.flops == model_flops(shape, fastv.tokens, extra_rows=[ExtraRows(K - 1)])
    assert small.flops == model_flops(shape, small.tokens)


@pytest.mark.usefixtures("quick_rates")
def test_the_prefill_holds_all_that_pruning_does(
    model: LlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is read before the pruner's first hook on the decoder and after its last."""
    events: list[str] = []

    def told(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    told(run, "arrive")
    told(run, "leave")
    told(Clock, "mark")
    measure(model, [FASTV], attainable=False, **QUICK | {"new_tokens": 1, "warmup": 0})
    pruned = ["mark", "arrive", "leave", "mark"]
    assert events == pruned + (["mark", "mark", *pruned]) * 2


@pytest.mark.usefixtures("quick_rates")
def test_one_token_is_not_decoded(model: LlavaForConditionalGeneration) -> None:
    result = measure(model, [FASTV], **QUICK | {"new_tokens": 1})
    assert all(setting.timing.decode is None for setting in result.settings)
    record = result.to_dict()["settings"][1]
    assert record["decode_ms_per_token"] is None
    assert "decode" not in record["over_attainable"]
    assert "decode_ms_per_token" not in record["roofline"]


@pytest.mark.usefixtures("quick_rates")
def test_without_the_attainable(model: LlavaForConditionalGeneration) -> None:
    names: list[str] = []
    result = measure(
        model, [FASTV], attainable=False, progress=lambda *what: names.append(what[2]), **QUICK
    )
    assert set(names) == {"unpruned", "FastV(keep=6, layer=2)"}
    assert result.settings[1].attainable is None
    assert result.to_dict()["settings"][1]["over_attainable"] is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("text_before", -1),
        ("text_after", 0),
        ("new_tokens", 0),
        ("repeats", 0),
        ("warmup", -1),
        ("repeats", 2.0),
        ("repeats", True),
    ],
)
def test_numbers_out_of_range(
    model: LlavaForConditionalGeneration, name: str, value: object
) -> None:
    with pytest.raises(InputError, match=f"{name} must be a whole number of at least"):
        measure(model, [FASTV], **QUICK | {name: value})


@pytest.mark.parametrize("what", [{"device": "cpu"}, {"dtype": torch.float16}, {"attention": "e"}])
def test_a_loaded_model_has_its_own_settings(
    model: LlavaForConditionalGeneration, what: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="a loaded model has its own"):
        measure(model, [FASTV], **what)


def test_names_must_differ(model: LlavaForConditionalGeneration) -> None:
    for pruners in ([FASTV, FASTV], {"unpruned": FASTV}):
        with pytest.raises(InputError, match="give each its own name"):
            measure(model, pruners, **QUICK)


def test_a_budget_that_does_not_fit_leaves_the_model_alone(
    model: LlavaForConditionalGeneration,
) -> None:
    with pytest.raises(BudgetError):
        measure(model, [pore.FastV(keep=N + 1)], **QUICK)
    assert untouched(model)
    assert gc.isenabled()


def test_several_devices_are_refused() -> None:
    model = tiny_llava()
    model.lm_head.to("meta")
    with pytest.raises(InputError, match="on 2 devices"):
        measure(model, [FASTV], **QUICK)


def test_calibration_beside_tower_and_layers(
    model: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    ran: list[int] = []
    layers = model.model.language_model.layers
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(layers)
    ]
    result = measure_calibration(
        model, K, batch_size=2, text_before=BEFORE, text_after=AFTER, repeats=2, warmup=1
    )
    for hook in hooks:
        hook.remove()
    # Calibration stops before the MLP of layer K - 1; the bare run ends after it.
    assert ran == [0, 0, 1] * 3
    assert len(result.calibration.samples) == len(result.attainable.samples) == 2
    record = json.loads(result.save(tmp_path / "calibration.json").read_text())
    assert (record["schema"], record["version"]) == ("pore.bench.calibration", 1)
    assert record["layer"] == K
    assert record["workload"]["batch_size"] == 2
    for name in ("calibration_ms", "attainable_ms", "over_attainable"):
        assert len(record[name]["samples"]) == 2
    assert untouched(model)
    assert model.config.text_config.num_hidden_layers == LAYERS


def test_calibration_of_a_layer_that_is_not_there(model: LlavaForConditionalGeneration) -> None:
    with pytest.raises(BudgetError, match="cannot be the first pruned layer"):
        measure_calibration(model, LAYERS)
