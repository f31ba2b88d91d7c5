"""ST3-style pruning: a schedule, two readers, and nothing claimed of the paper."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pore
from helpers.models import N, batch, prompt, tiny_llava
from helpers.recording import Recording
from pore.cost.named import model_shape
from pore.errors import BudgetError, PoreError, ProfileMismatchError, ScoreError
from pore.methods.st3 import left_after

ratios = st.none() | st.floats(0.01, 0.99)


@given(st.integers(1, 3000), st.floats(0.001, 1.0), st.integers(1, 12), ratios)
def test_schedules_fall_to_the_budget(
    visual: int, share: float, prunings: int, ratio: float | None
) -> None:
    keep = max(1, int(visual * share))
    left = left_after(keep, prunings, ratio, visual)
    assert len(left) == prunings
    assert left[-1] == keep
    assert all(a >= b >= keep for a, b in pairwise([visual, *left]))
    if ratio is not None:
        for i, count in enumerate(left[:-1]):
            assert count == max(keep, round(visual * (1 - ratio) ** (i + 1)))


def test_schedules_by_hand() -> None:
    assert left_after(72, 3, None, 576) == [288, 144, 72]
    assert left_after(0.125, 3, None, 576) == [288, 144, 72]
    assert left_after(100, 4, 0.5, 576) == [288, 144, 100, 100]
    assert left_after(10, 3, 0.5, 576) == [288, 144, 10]  # the last drops what is still above


def test_counts_name_the_layers() -> None:
    pruner = pore.ST3Style(72, start=2, stride=3, prunings=3)
    assert pruner.counts(576, 10) == [576] * 2 + [288] * 3 + [144] * 3 + [72] * 2


@pytest.mark.parametrize("depth", [2, 3, 5, 8, 12, 28, 32, 40, 80])
def test_usual_fits_any_depth(depth: int) -> None:
    shape = model_shape("llava-1.5-7b")
    pruner = pore.ST3Style.usual(64, replace(shape, decoder=replace(shape.decoder, layers=depth)))
    layers = [stage.layer for stage in pruner.stages()]
    assert 1 <= layers[0] <= layers[-1] < depth
    assert pruner.counts(576, depth)[-1] == 64
    if depth == 32:
        assert pruner == pore.ST3Style(64)


@pytest.mark.parametrize("query", ["last", "text"])
def test_ranks_by_the_attention_of_the_layer_before(query: Any) -> None:
    model, eager = tiny_llava(), tiny_llava(attention="eager")
    inputs = batch([prompt(3, 1, 5)])
    recording = Recording(pore.ST3Style(5, start=2, stride=2, prunings=1, query=query))
    with torch.no_grad(), recording(model) as run:
        model(**inputs)
    with torch.no_grad():
        maps = eager(**inputs, output_attentions=True).attentions[1][0].mean(0)
    image = slice(3, 3 + N)
    expected = maps[-1, image] if query == "last" else maps[3 + N :, image].mean(0)
    torch.testing.assert_close(recording.seen[0].view.attention[0], expected, rtol=2e-5, atol=1e-9)
    assert list(run.report.samples[0].images[0].kept) == sorted(expected.topk(5).indices.tolist())


@pytest.mark.parametrize("query", ["last", "text"])
@pytest.mark.parametrize("ratio", [None, 0.3])
def test_meets_the_budget_in_a_ragged_batch(query: Any, ratio: float | None) -> None:
    model = tiny_llava()
    pruner = pore.ST3Style(4, start=1, stride=1, prunings=3, query=query, ratio=ratio)
    prompts = [prompt(3, 1, 5), prompt(2, 3, 4, 1), prompt(9, 0, 4, 1)]
    with torch.no_grad(), pruner(model) as run:
        model(**batch(prompts))
    expected = pruner.counts(N, 5)
    for sample in run.report:
        text = sample.unpruned[0] - N * len(sample.images)
        assert list(sample.tokens) == [text + len(sample.images) * count for count in expected]


def test_every_pruning_has_its_own_bias() -> None:
    model, inputs = tiny_llava(), batch([prompt(3, 1, 5)])
    flat, steep = (pore.PositionBias.exponential(rate, N) for rate in (0.0, 3.0))
    pruner = pore.ST3Style(4, start=2, stride=2, prunings=2)
    kept = []
    for reweight in (None, flat, (flat, steep), (steep, flat)):
        with torch.no_grad(), replace(pruner, reweight=reweight)(model) as run:
            model(**inputs)
        kept.append(run.report.samples[0].images[0].stages)
    assert kept[0] == kept[1]
    assert kept[0][0] == kept[2][0] != kept[3][0]
    assert kept[0][1] != kept[2][1]
    with pytest.raises(ProfileMismatchError, match="1 corrections for 2 stages"):
        replace(pruner, reweight=(flat,))


def test_after_a_method_that_left_fewer() -> None:
    model = tiny_llava()
    chain = pore.Chain(pore.FasterVLM(6), pore.ST3Style(4, start=1, stride=2, prunings=2))
    with torch.no_grad(), chain(model) as run:
        model(**batch([prompt(3, 1, 5)]))
    assert [n - 8 for n in run.report.samples[0].tokens] == [6, 6, 6, 4, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0}, "at least 1"),
        ({"start": 0}, "start must be"),
        ({"stride": 1.5}, "stride must be"),
        ({"prunings": True}, "prunings must be"),
        ({"ratio": 1.0}, "share between 0 and 1"),
        ({"ratio": float("nan")}, "share between 0 and 1"),
        ({"query": "first"}, "'last' or 'text'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((BudgetError, ScoreError), match=message):
        pore.ST3Style(**{"keep": 5, **settings})


def test_what_does_not_fit_the_model_is_refused() -> None:
    model = tiny_llava()
    with pytest.raises(BudgetError, match="decoder of 5 layers"), pore.ST3Style(4)(model):
        pass
    bias = pore.PositionBias.exponential(
        0.1, N, provenance=pore.Provenance(layer=2, normalize="prompt")
    )
    for pruner in (
        pore.ST3Style(4, start=2, prunings=1, query="text", reweight=bias),
        pore.ST3Style(4, start=2, stride=1, prunings=2, reweight=bias),
    ):
        with pytest.raises(ProfileMismatchError, match="other conditions"), pruner(model):
            pass
    with (
        torch.no_grad(),
        pytest.raises(PoreError, match="Image 0 of sample 0"),
        pore.ST3Style(N + 1, start=1, stride=1, prunings=2)(model),
    ):
        model(**batch([prompt(3, 1, 5)]))


def test_says_that_it_is_an_experiment() -> None:
    assert pore.ST3Style.experimental
    assert pore.methods()["ST3-style"] is pore.ST3Style
