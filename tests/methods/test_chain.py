"""Chains: methods one after another, each on what the one before it left."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pore
from helpers.engine import BATCHES, tolerance
from helpers.models import IMAGE, N, batch, tiny_llava
from pore.errors import BudgetError

P = pore.PositionBias.exponential(0.1, N)
CHAINS = [
    pore.Chain(pore.FasterVLM(keep=10), pore.FastV(keep=4)),
    pore.Chain(pore.FasterVLM(keep=10), pore.FastV(keep=4, reweight=P)),
    pore.Chain(pore.FasterVLM(keep=12), pore.DivPrune(keep=8), pore.FastV(keep=4, layer=3)),
    pore.Chain(pore.DivPrune(keep=9), pore.PyramidDrop(keep=3, layers=(2, 4))),
    pore.Chain(pore.FastV(keep=9, layer=1), pore.PyramidDrop(keep=3, layers=(2, 4))),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava()


@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.name)
def test_batch_equals_singles_and_budgets_are_met(model: Any, chain: Any, prompts: Any) -> None:
    inputs = batch(prompts)
    with torch.no_grad(), chain(model) as run:
        together = model(**inputs).logits
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    counts, first = chain.counts(N, 5), 0
    for row, ids in enumerate(prompts):
        one: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if images := ids.count(IMAGE) // N:
            one["pixel_values"] = inputs["pixel_values"][first : first + images]
            first += images
        with torch.no_grad(), chain(model) as alone:
            single = model(**one).logits[0]
        sample = run.report.samples[row]
        assert alone.report.samples[0].images == sample.images
        text = len(ids) - ids.count(IMAGE)
        assert list(sample.tokens) == [text + images * count for count in counts]
        got = together[row, -single.shape[0] :]
        torch.testing.assert_close(got, single, **tolerance("sdpa"))


def test_the_bias_is_read_at_the_patch_a_token_stands_for(model: Any) -> None:
    """With a P that rules out all but some patches, these are what stays of what came through."""
    inputs = batch(BATCHES["several images"])
    low = torch.full((N,), 1e12, dtype=torch.float64)
    low[10:] = 1e-12
    bias = pore.PositionBias.fit(low, kind="empirical")
    tower = pore.FasterVLM(keep=12)
    with torch.no_grad(), tower(model) as run:
        model(**inputs)
    came = [set(image.kept) for sample in run.report for image in sample.images]
    with torch.no_grad(), pore.Chain(tower, pore.FastV(keep=3, reweight=bias))(model) as run:
        model(**inputs)
    for image, through in zip((i for s in run.report for i in s.images), came, strict=True):
        wanted = {patch for patch in through if patch >= 10}
        assert len(wanted) >= 3
        assert set(image.kept) <= wanted


def test_keep_all_is_bit_equal(model: Any) -> None:
    inputs = batch(BATCHES["no image in one row"])
    with torch.no_grad():
        dense = model(**inputs).logits
        chain = pore.Chain(pore.FasterVLM(keep=N), pore.DivPrune(keep=N), pore.FastV(keep=N))
        with chain(model):
            assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([pore.FastV(keep=4)], "two or more"),
        ([pore.FastV(keep=4), pore.FasterVLM(keep=8)], "acts in the vision tower"),
        ([pore.FasterVLM(keep=8), pore.VTCCLS(keep=4, start_layer=0)], "acts in the vision tower"),
        ([pore.FastV(keep=8, layer=2), pore.FastV(keep=4, layer=2)], "put them in order"),
        ([pore.FastV(keep=8), pore.DivPrune(keep=4)], "put them in order"),
        ([CHAINS[0], pore.FastV(keep=2, layer=4)], "not chains"),
        (
            [pore.PyramidDrop(keep=8, layers=(1, 2)), pore.FastV(keep=4, layer=3)],
            "numbers positions",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(methods: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        pore.Chain(*methods)


def test_a_later_method_cannot_keep_more_than_is_left(model: Any) -> None:
    chain = pore.Chain(pore.FasterVLM(keep=4), pore.FastV(keep=6))
    with pytest.raises(BudgetError, match="only \\[4"), chain(model):
        model(**batch(BATCHES["single"]))


def test_a_grid_with_holes_is_not_pooled(model: Any) -> None:
    chain = pore.Chain(pore.FasterVLM(keep=8), pore.Downsample(keep=4))
    with pytest.raises(pore.PoreError, match="fill no grid"), chain(model):
        model(**batch(BATCHES["single"]))
