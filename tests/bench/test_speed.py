"""Speed: what is timed, in which order, and what is written; never how long anything takes."""

from __future__ import annotations

import gc
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import DynamicCache, LlavaForConditionalGeneration

import pore
from helpers.models import N, batch, prompt, tiny_llava
from pore.bench import measuring, runs
from pore.bench.measuring import measure, measure_calibration
from pore.bench.results import Rates, Spread, Workload, table
from pore.bench.runs import Attainable
from pore.bench.setup import build
from pore.cost.flops import ExtraRows, model_flops
from pore.engine.run import Run
from pore.errors import BudgetError, InputError, UnsupportedModelError
from pore.families.registry import shape_of

LAYERS, K, KEEP = 5, 2, 6
BEFORE, AFTER = 3, 4
PROMPT = BEFORE + N + AFTER
SHORT = BEFORE + KEEP + AFTER
FASTV = pore.FastV(keep=KEEP, layer=K)
QUICK: dict[str, Any] = {
    "text_before": BEFORE,
    "text_after": AFTER,
    "new_tokens": 3,
    "repeats": 2,
    "warmup": 1,
}


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return tiny_llava(layers=LAYERS, dtype=torch.float32)


@pytest.fixture
def _rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the device takes seconds, and has a test of its own."""
    monkeypatch.setattr(measuring, "device_rates", lambda *_: Rates(flops=1e9, bandwidth=1e9))


def bytes_of(tokens: tuple[int, ...], rows: int) -> int:
    """A cache of 2 key and value heads of width 8 in float32."""
    return sum(count * rows * 2 * 2 * 8 * 4 for count in tokens)


def untouched(model: Any) -> bool:
    """Whether no hook is left; transformers itself hooks the layers of the vision tower."""
    decoder = model.model.language_model
    attention = [layer.self_attn for layer in decoder.layers]
    return not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in (model, model.model, decoder, *decoder.layers, *attention)
    )


# -- what is measured -------------------------------------------------------------------------


@pytest.mark.usefixtures("_rates")
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


@pytest.mark.usefixtures("_rates")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_attainable_does_the_same_work(attention: str, rows: int) -> None:
    """Given the positions that a pruner keeps, it gives the pruner's logits, and decodes them."""
    model = tiny_llava(layers=LAYERS, attention=attention)
    inputs = batch([prompt(BEFORE, 1, AFTER)] * rows)
    inputs["pixel_values"] = inputs["pixel_values"][:1].expand(rows, -1, -1, -1)
    token = torch.full((rows, 1), 7)

    def logits() -> list[Tensor]:
        cache = DynamicCache(config=model.config.text_config)
        found = [model(**inputs, past_key_values=cache).logits[:, -1]]
        mask = inputs["attention_mask"]
        for _ in range(2):
            mask = nn.functional.pad(mask, (0, 1), value=1)
            step = model(input_ids=token, attention_mask=mask, past_key_values=cache)
            found.append(step.logits[:, -1])
        lengths = [layer.keys.shape[-2] for layer in cache.layers]
        assert lengths == [PROMPT + 2] * K + [SHORT + 2] * (LAYERS - K)
        return found

    with torch.inference_mode():
        with FASTV(model) as run:
            pruned = logits()
        kept = run.report.samples[0].images[0].kept
        text = [*range(BEFORE), *range(BEFORE + N, PROMPT)]
        index = torch.tensor(sorted([*text, *(BEFORE + i for i in kept)]))
        with Attainable(model.model.language_model, {K: index}):
            attained = logits()
    error = 1e-5 if attention == "eager" else 1e-9
    for one, other in zip(pruned, attained, strict=True):
        torch.testing.assert_close(one, other, rtol=error, atol=error)
    assert untouched(model)


def test_the_attainable_is_left_by_an_exception(model: LlavaForConditionalGeneration) -> None:
    with pytest.raises(KeyError), Attainable(model.model.language_model, {}):
        raise KeyError
    assert untouched(model)


@pytest.mark.usefixtures("_rates")
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

    told(Run, "_before_decoder")
    told(Run, "_after_decoder")
    told(runs._Clock, "mark")
    measure(model, [FASTV], attainable=False, **QUICK | {"new_tokens": 1, "warmup": 0})
    pruned = ["mark", "_before_decoder", "_after_decoder", "mark"]
    assert events == pruned + (["mark", "mark", *pruned]) * 2


def test_cuts_keep_the_last_token() -> None:
    cuts = runs._cuts((30, 30, 12, 12, 5), 30, torch.device("cpu"))
    assert {layer: len(index) for layer, index in cuts.items()} == {2: 12, 4: 5}
    for index, before in ((cuts[2], 30), (cuts[4], 12)):
        assert index[0] == 0
        assert index[-1] == before - 1
        assert all(a < b for a, b in pairwise(index.tolist()))


@pytest.mark.usefixtures("_rates")
def test_one_token_is_not_decoded(model: LlavaForConditionalGeneration) -> None:
    result = measure(model, [FASTV], **QUICK | {"new_tokens": 1})
    assert all(setting.timing.decode is None for setting in result.settings)
    record = result.to_dict()["settings"][1]
    assert record["decode_ms_per_token"] is None
    assert "decode" not in record["over_attainable"]
    assert "decode_ms_per_token" not in record["roofline"]


@pytest.mark.usefixtures("_rates")
def test_without_the_attainable(model: LlavaForConditionalGeneration) -> None:
    names: list[str] = []
    result = measure(
        model, [FASTV], attainable=False, progress=lambda *what: names.append(what[2]), **QUICK
    )
    assert set(names) == {"unpruned", "FastV(keep=6, layer=2)"}
    assert result.settings[1].attainable is None
    assert result.to_dict()["settings"][1]["over_attainable"] is None


def test_rates_are_those_of_a_product_and_a_copy() -> None:
    rates = runs.device_rates(torch.device("cpu"), torch.float32)
    assert rates.flops > 0
    assert rates.bandwidth > 0


# -- what is written --------------------------------------------------------------------------


@pytest.mark.usefixtures("_rates")
def test_json(model: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    bias = pore.PositionBias.exponential(0.1, N)
    pruner = pore.FastV(keep=0.25, layer=K, reweight=bias)
    result = measure(model, [pruner], command="pore bench", **QUICK)
    record = json.loads(result.save(tmp_path / "new" / "bench.json").read_text())
    assert record == json.loads(result.to_json())
    assert (record["schema"], record["version"]) == ("pore.bench", 1)
    assert record["command"] == "pore bench"
    assert record["workload"] == {
        "batch_size": 1,
        "text_before": BEFORE,
        "visual": N,
        "text_after": AFTER,
        "new_tokens": 3,
        "repeats": 2,
        "warmup": 1,
        "seed": 0,
    }
    assert record["model"]["dtype"] == "float32"
    assert record["model"]["attention"] == "sdpa"
    assert record["model"]["weights_bytes"] == 4 * record["model"]["parameters"]
    assert record["hardware"]["device"] == "cpu"
    assert record["hardware"]["threads"] == torch.get_num_threads()
    assert "not measured" in record["hardware"]["peak_memory"]
    assert {"python", "torch", "transformers"} <= set(record["versions"])
    assert record["rates"] == {"matmul_flops_per_s": 1e9, "copy_bytes_per_s": 1e9}
    unpruned, pruned = record["settings"]
    assert unpruned["name"] == "unpruned"
    assert unpruned["over_unpruned"]["prefill"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
    assert unpruned["attainable"] is unpruned["over_attainable"] is None
    assert pruned["name"] == "FastV(keep=0.25, layer=2, reweight=exponential)"
    assert pruned["settings"]["method"] == "FastV"
    assert pruned["settings"]["reweight"] == "exponential"
    assert pruned["tokens_per_layer"] == [PROMPT] * K + [BEFORE + 4 + AFTER] * (LAYERS - K)
    assert pruned["flops"]["count"] == "true"
    timed = {"prefill_ms", "ttft_ms", "decode_ms_per_token"}
    for one in (unpruned, pruned, pruned["attainable"]):
        assert timed | {"peak_memory_bytes", "cache_bytes"} <= set(one)
        for name in timed:
            assert set(one[name]) == {"median", "q1", "q3", "samples"}
    for one in (pruned["over_unpruned"], pruned["over_attainable"]):
        assert set(one) == {"prefill", "ttft", "decode"}
    share = pruned["roofline"]["prefill_ms"] / pruned["prefill_ms"]["median"]
    assert pruned["roofline"]["prefill_share"] == pytest.approx(share)
    assert pruned["roofline"]["prefill_ms"] == pytest.approx(
        sum(pruned["flops"]["per_layer"]) / 1e9 * 1e3
    )


@pytest.mark.usefixtures("_rates")
def test_table(model: LlavaForConditionalGeneration) -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    result = measure(model, [FASTV, pore.Downsample(keep=4)], **QUICK)
    shown = table(result)
    console.print(shown)
    text = console.export_text()
    assert shown.row_count == 3
    for words in ("unpruned", "FastV(keep=6, layer=2)", "Downsample(keep=4)", "13 from 2", "sdpa"):
        assert words in text


def test_spread() -> None:
    spread = Spread((4.0, 1.0, 3.0, 2.0, 5.0))
    assert (spread.q1, spread.median, spread.q3) == (2.0, 3.0, 4.0)
    assert spread.over(Spread((2.0, 1.0, 1.0, 2.0, 5.0))).samples == (2.0, 1.0, 3.0, 1.0, 1.0)


# -- random weights ---------------------------------------------------------------------------


def test_build() -> None:
    model: Any = build("llava-64x2", dtype=torch.bfloat16, attention="eager", seed=3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    decoder = model.model.language_model
    assert decoder.config._attn_implementation == "eager"
    assert bool((decoder.norm.weight == 1).all())
    assert bool((model.model.vision_tower.pre_layrnorm.bias == 0).all())
    weight = decoder.layers[0].mlp.gate_proj.weight.float()
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert weight.unique(dim=0).shape == weight.shape
    assert decoder.rotary_emb.inv_freq[0] == 1
    again: Any = build("llava-64x2", dtype=torch.bfloat16, attention="eager", seed=3)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    inputs = runs._Runner(model, Workload(1, 2, 576, 3, 1, 1, 0, 0)).inputs
    with torch.inference_mode():
        logits = model(
            input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], logits_to_keep=1
        ).logits
    assert bool(torch.isfinite(logits).all())


@pytest.mark.usefixtures("_rates")
def test_a_shape_is_built_as_asked() -> None:
    once = {"new_tokens": 1, "repeats": 1, "warmup": 0, "attainable": False}
    result = measure("llava-64x3", [], dtype=torch.bfloat16, attention="eager", **once)
    assert result.model["name"] == "llava-64x3, random weights"
    assert result.model["dtype"] == "bfloat16"
    assert result.model["attention"] == "eager"
    assert result.workload.visual == 576


def test_a_kernel_that_is_not_there() -> None:
    with pytest.raises(InputError, match="cannot be built with attention 'no_such_kernel'"):
        build("llava-64x2", attention="no_such_kernel")


def test_a_shape_that_is_none() -> None:
    with pytest.raises(UnsupportedModelError, match="is not a shape"):
        measure("llava-7", [FASTV])


# -- bad input --------------------------------------------------------------------------------


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


# -- calibration ------------------------------------------------------------------------------


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
    # Calibration stops before the MLP of layer K - 1; the bare run ends behind it.
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
