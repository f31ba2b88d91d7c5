"""Every registered method in the engine's whole world: one set of demands, met by each of them.

A method enters by being registered: its settings are those of `usual`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import pore
from helpers.engine import BATCHES, fingerprint, tolerance
from helpers.methods import (
    DRAWING,
    EVERY,
    KEEP,
    LAYERS,
    asked,
    ends,
    in_decoder,
    model_of,
    under,
    usual,
)
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from helpers.recording import decoded_and_whole
from helpers.reference import dropped_by_stage, masked_from
from pore.families.registry import shape_of


def cells(others: Iterable[str], fast: Iterable[tuple[str, str]]) -> Any:
    """Every batch in every one of other conditions, of which those not `fast` are marked slow."""
    fast = set(fast)
    return [
        pytest.param(
            prompts, other, id=f"{name}-{other}", marks=() if (name, other) in fast else SLOW
        )
        for name, prompts in BATCHES.items()
        for other in others
    ]


SLOW = pytest.mark.slow
EVERYTHING = "no image in one row"
"""The batch that has all there is: ragged text, several images in a row, a row without."""


@pytest.mark.parametrize(
    ("prompts", "side"),
    cells(("left", "right"), [(EVERYTHING, "left"), ("several images", "right")]),
)
class TestBatches:
    @pytest.mark.parametrize("name", EVERY)
    def test_keep_all_is_bit_equal(self, name: str, side: str, prompts: Any) -> None:
        model, inputs = model_of(), batch(asked(name, prompts), side)
        with torch.no_grad():
            dense = model(**inputs).logits
            with usual(name, N)(model):
                assert torch.equal(model(**inputs).logits, dense)

    @pytest.mark.parametrize("name", EVERY)
    def test_budget_is_met(self, name: str, side: str, prompts: Any) -> None:
        prompts = asked(name, prompts)
        model, inputs, pruner = model_of(), batch(prompts, side), usual(name, KEEP)
        with torch.no_grad(), pruner(model) as run:
            model(**inputs)
        expected = pruner.counts(N, LAYERS)
        assert expected[-1] == KEEP
        for sample, ids in zip(run.report, prompts, strict=True):
            text, images = len(ids) - ids.count(IMAGE), len(sample.images)
            assert list(sample.tokens) == [text + images * count for count in expected]
            for image in sample.images:
                assert len(image.kept) + image.extra == KEEP
                assert len(set(image.kept)) == len(image.kept)
                assert set(image.kept) <= set(range(N))
            assert (sample.flops < sample.unpruned_flops) == bool(images)

    @pytest.mark.parametrize("name", [name for name in EVERY if name not in DRAWING])
    @pytest.mark.at_once(12)
    def test_batch_equals_singles(self, name: str, side: str, prompts: Any) -> None:
        prompts = asked(name, prompts)
        model, inputs, pruner = model_of(), batch(prompts, side), usual(name, KEEP)
        if pruner.reads_positions:  # a plain forward counts left padding
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad(), pruner(model) as run:
            together = model(**inputs).logits
        tokens = [sample.tokens[-1] for sample in run.report]
        first = 0
        for row, got in enumerate(ends(together, inputs["attention_mask"], tokens)):
            ids = prompts[row]
            one: dict[str, Any] = {"input_ids": torch.tensor([ids])}
            if images := ids.count(IMAGE) // N:
                one["pixel_values"] = inputs["pixel_values"][first : first + images]
                first += images
            with torch.no_grad(), pruner(model) as alone:
                single = model(**one).logits[0]
            assert alone.report.samples[0].images == run.report.samples[row].images
            torch.testing.assert_close(got, single, **tolerance("sdpa"))

    @pytest.mark.parametrize("name", [name for name in EVERY if in_decoder(usual(name, KEEP))])
    def test_equals_masked_dense(self, name: str, side: str, prompts: Any) -> None:
        prompts = asked(name, prompts)
        model, inputs, pruner = model_of(), batch(prompts, side), usual(name, KEEP)
        with torch.no_grad(), pruner(model) as run:
            short = model(**inputs).logits
        stages = dropped_by_stage(run, inputs["input_ids"] == IMAGE)
        tokens = inputs["attention_mask"].bool()
        with torch.no_grad(), masked_from(model.model.language_model.layers, stages, tokens):
            dense = model(**inputs, use_cache=False).logits
        kept = tokens & ~stages[-1][1]
        found = ends(short, tokens, kept.sum(1).tolist())
        for row, got in enumerate(found):
            torch.testing.assert_close(got, dense[row, kept[row]], **tolerance("sdpa"))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.at_once(12)
def test_flash_attention_equals_sdpa(name: str, side: str) -> None:
    """With FlashAttention's contract: 2-D masks, causal, aligned at the end."""
    prompts = asked(name, BATCHES["no image in one row"])
    inputs, pruner = batch(prompts, side), under("flash_test", usual(name, KEEP))
    with torch.no_grad(), pruner(model_of()) as one:
        expected = model_of()(**inputs).logits
    with torch.no_grad(), pruner(model_of("flash_test")) as other:
        got = model_of("flash_test")(**inputs).logits
    assert [s.images for s in one.report] == [s.images for s in other.report]
    tokens = [sample.tokens[-1] for sample in one.report]
    mask = inputs["attention_mask"]
    for a, b in zip(ends(got, mask, tokens), ends(expected, mask, tokens), strict=True):
        torch.testing.assert_close(a, b, **tolerance("sdpa"))


@pytest.mark.parametrize(
    ("prompts", "attention"),
    cells(("sdpa", "flash_test"), [(EVERYTHING, "sdpa"), ("several images", "flash_test")]),
)
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.at_once(12)
def test_cached_decode_equals_a_full_forward_with_the_same_selection(
    name: str, prompts: Any, attention: str
) -> None:
    model, inputs = model_of(attention), batch(asked(name, prompts))
    pruner = under(attention, usual(name, KEEP))
    got, whole = decoded_and_whole(model, inputs, pruner)
    torch.testing.assert_close(got, whole, **tolerance("sdpa", torch.float32))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.at_once(6)
def test_static_cache_beams_and_sampling(name: str) -> None:
    model, inputs, pruner = model_of(), batch(BATCHES["ragged text"]), usual(name, KEEP)
    settings = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), pruner(model) as run:
        tokens = model.generate(**inputs, **settings)
        static = model.generate(**inputs, **settings, cache_implementation="static")
        beams = model.generate(**inputs, **settings, num_beams=2)
        model.generate(**inputs, max_new_tokens=2, do_sample=True, num_return_sequences=2)
    assert beams.shape == tokens.shape
    images = [sample.images for sample in run.report]
    if name not in DRAWING:
        assert torch.equal(tokens, static)
        assert images == [images[i] for i in (0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 1, 1)]


@pytest.mark.parametrize("name", EVERY)
def test_leaves_the_model_as_it_was(name: str) -> None:
    model, inputs, pruner = model_of(), batch([prompt(3, 1, 5)]), usual(name, KEEP)
    before = fingerprint(model)

    def fail() -> None:
        with pruner(model):
            model(**inputs)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert fingerprint(model) == before
    pruner.apply(model)
    pore.remove(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", EVERY)
def test_report_prints_and_is_json(name: str) -> None:
    model, pruner = model_of(), usual(name, KEEP)
    with torch.no_grad(), pruner(model) as run:
        model(**batch([prompt(3, 1, 5)]))
    assert f"{N} -> {KEEP}" in str(run.report)
    record = json.loads(run.report.to_json())
    assert record["method"] == name
    assert record["samples"][0]["mean_visual_tokens"] == pytest.approx(
        sum(pruner.counts(N, LAYERS)) / LAYERS
    )


@pytest.mark.parametrize("name", EVERY)
def test_half_precision(name: str) -> None:
    """Scores are taken in float32 at least; nothing mixes types."""
    model = tiny_llava(layers=LAYERS, tower_layers=4, dtype=torch.bfloat16)
    inputs = batch(BATCHES["several images"], dtype=torch.bfloat16)
    with torch.no_grad(), usual(name, KEEP)(model) as run:
        logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert bool(torch.isfinite(logits).all())
    assert all(len(i.kept) + i.extra == KEEP for s in run.report for i in s.images)


@cache
def of_576() -> tuple[LlavaForConditionalGeneration, dict[str, Tensor]]:
    """A model with the grid of LLaVA-1.5, and a prompt for it."""
    model = tiny_llava(layers=LAYERS, tower_layers=6, side=24, dtype=torch.float32)
    pixels = torch.randn(1, 3, 192, 192, generator=torch.Generator().manual_seed(4))
    ids = torch.tensor([[3, 4, *[IMAGE] * 576, 5, 6, 7]])
    return model, {"input_ids": ids, "pixel_values": pixels}


@pytest.mark.parametrize("keep", [pytest.param(192, marks=SLOW), 128, pytest.param(64, marks=SLOW)])
@pytest.mark.parametrize("name", EVERY)
def test_the_budgets_of_the_literature_are_met_exactly(name: str, keep: int) -> None:
    """Tokens after the last pruning, and those averaged over the layers, are what was said."""
    model, inputs = of_576()
    pruner = pore.methods()[name].usual(keep, shape_of(model.config))
    assert pruner is not None
    with torch.no_grad(), pruner(model) as run:
        model(**inputs)
    (sample,) = run.report
    (image,) = sample.images
    assert len(image.kept) + image.extra == keep
    assert len(set(image.kept)) == len(image.kept)
    counts = pruner.counts(576, LAYERS)
    assert list(sample.tokens) == [5 + count for count in counts]
    assert sample.mean_visual_tokens == pytest.approx(sum(counts) / LAYERS)
