"""Scorers of one's own: a small module trained here, put into the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pore
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from helpers.reference import dropped_columns, masked_from
from pore.cost.named import model_shape
from pore.errors import BudgetError, ScoreError
from pore.layout import Layout
from pore.methods.registry import methods
from pore.tensors.selection import top_k

PROMPTS = [prompt(3, 2, 5), prompt(9, 0, 4, 1), prompt(1, 1, 2, 2)]


class Head(nn.Module):
    """A predictor of two logits, keep and drop, from the state of a token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 2)).double()

    def forward(self, hidden_states: Tensor, layout: Layout, attention: Tensor | None) -> Tensor:
        return self.logits(layout.gather(hidden_states))[..., 0]

    def logits(self, states: Tensor) -> Tensor:
        return self.net(states).log_softmax(-1)


def trained(model: Any, inputs: dict[str, Tensor], layer: int, keep: int) -> tuple[Head, float]:
    """A head that learned on the frozen model which tokens attention would keep, and how well."""
    states: list[Tensor] = []
    labels: list[Tensor] = []

    def teacher(hidden_states: Tensor, layout: Layout, attention: Tensor | None) -> Tensor:
        assert attention is not None
        states.append(layout.gather(hidden_states))
        labels.append(top_k(attention, [keep] * len(attention), layout.valid))
        return attention

    with torch.no_grad(), pore.Scored(1.0, teacher, layer, normalize="prompt")(model):
        model(**inputs)
    head = Head()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    weight = torch.tensor([N / keep, 1.0], dtype=torch.float64)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.nll_loss(
            head.logits(states[0]).flatten(0, 1), (~labels[0]).long().flatten(), weight
        )
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        chosen = top_k(head.logits(states[0])[..., 0], [keep] * len(labels[0]))
    return head.eval(), float((chosen & labels[0]).sum() / labels[0].sum())


def test_a_trained_scorer_keeps_what_it_learned() -> None:
    model, inputs = tiny_llava(), batch([prompt(3, 1, 5, seed) for seed in range(8)])
    head, recall = trained(model, inputs, layer=2, keep=5)
    assert recall > 0.8  # by chance 5 / 16
    with torch.no_grad(), pore.Scored(5, head)(model) as run:
        short = model(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with torch.no_grad(), pore.FastV(keep=5)(model) as teacher:
        model(**inputs)
    kept = [set(sample.images[0].kept) for sample in run.report.samples[:8]]
    wanted = [set(sample.images[0].kept) for sample in teacher.report]
    assert sum(len(a & b) for a, b in zip(kept, wanted, strict=True)) == round(recall * 5 * 8)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 3

    dropped = dropped_columns(run, inputs["input_ids"].repeat(2, 1), IMAGE)[:8]
    tokens = inputs["attention_mask"]
    with masked_from(model.model.language_model.layers, [(2, dropped)], tokens):
        dense = model(**inputs, use_cache=False).logits
    for row in range(8):
        torch.testing.assert_close(short[row], dense[row, ~dropped[row]], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layer", [0, 1, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_singles(layer: int, side: str) -> None:
    model, inputs, head = tiny_llava(), batch(PROMPTS, side), Head()
    with torch.no_grad(), pore.Scored(0.25, head, layer)(model) as together:
        model(**inputs)
    first = 0
    for row, ids in enumerate(PROMPTS):
        images = ids.count(IMAGE) // N
        one: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if images:
            one["pixel_values"] = inputs["pixel_values"][first : first + images]
            first += images
        with torch.no_grad(), pore.Scored(0.25, head, layer)(model) as alone:
            model(**one)
        assert alone.report.samples[0].images == together.report.samples[row].images
        assert all(len(image.kept) == N // 4 for image in alone.report.samples[0].images)


@pytest.mark.parametrize("normalize", ["prompt", "visual"])
def test_the_scorer_gets_the_attention_of_fastv(normalize: Any) -> None:
    model, inputs = tiny_llava(), batch(PROMPTS)

    def attention(hidden_states: Tensor, layout: Layout, attention: Tensor | None) -> Tensor:
        assert hidden_states.shape == (3, inputs["input_ids"].shape[1], 32)
        assert attention is not None
        return attention

    reports = []
    for pruner in (
        pore.Scored(5, attention, layer=3, normalize=normalize),
        pore.FastV(5, layer=3, normalize=normalize),
    ):
        with torch.no_grad(), pruner(model) as run:
            model(**inputs)
        reports.append([sample.images for sample in run.report])
    assert reports[0] == reports[1]


def test_a_schedule_over_layers() -> None:
    model, inputs, head = tiny_llava(), batch(PROMPTS), Head()
    chain = pore.Chain(pore.Scored(8, head, layer=1), pore.Scored(3, head, layer=3))
    with torch.no_grad(), chain(model) as run:
        model(**inputs)
    assert run.report.samples[2].tokens == (19, 11, 11, 6, 6)
    assert chain.counts(N, 5) == [16, 8, 8, 3, 3]


def test_keep_all_is_bit_equal() -> None:
    model, inputs = tiny_llava(), batch(PROMPTS)
    dense = model(**inputs).logits
    with pore.Scored(1.0, Head())(model):
        assert torch.equal(model(**inputs).logits, dense)


def test_entries_that_are_not_valid_are_ignored() -> None:
    layout_sizes: list[Any] = []

    def last(hidden_states: Tensor, layout: Layout, _: Tensor | None) -> Tensor:
        layout_sizes.append(layout.counts)
        scores = torch.arange(layout.valid.shape[1]).expand(layout.valid.shape).double()
        return scores.masked_fill(~layout.valid, torch.nan)

    model = tiny_llava()
    visual = torch.zeros(2, 20, dtype=torch.bool)
    visual[0, 2:12] = visual[1, 4:9] = True
    with torch.no_grad(), pore.Scored(3, last)(model) as run:
        run.mark_visual(visual)
        model(inputs_embeds=torch.randn(2, 20, 32, dtype=torch.float64))
    assert layout_sizes == [[10, 5]]
    assert [sample.images[0].kept for sample in run.report] == [(7, 8, 9), (2, 3, 4)]


class TestBadInput:
    inputs = batch([prompt(3, 1, 5)])

    @pytest.mark.parametrize(
        ("scores", "message"),
        [
            (torch.zeros(1, N + 1), r"shape \(1, 17\)"),
            (torch.zeros(N), r"must be \(1, 16\)"),
            (torch.full((1, N), torch.nan), "NaN"),
            ([0.0] * N, "returned list"),
        ],
    )
    def test_scores_that_do_not_fit(self, scores: Any, message: str) -> None:
        model = tiny_llava()
        with (
            pore.Scored(4, lambda *_: scores)(model),
            pytest.raises(ScoreError, match=message),
        ):
            model(**self.inputs)

    def test_a_scorer_that_cannot_be_called(self) -> None:
        with pytest.raises(ScoreError, match="callable"):
            pore.Scored(4, "scorer.safetensors")  # type: ignore[arg-type]

    def test_no_layer_before_the_first(self) -> None:
        with pytest.raises(BudgetError, match="layer=1"):
            pore.Scored(4, Head(), layer=0, normalize="prompt")

    @pytest.mark.parametrize("layer", [-1, 5, True])
    def test_layer_out_of_range(self, layer: Any) -> None:
        with (
            pytest.raises(BudgetError, match="choose 0 to 4"),
            pore.Scored(4, Head(), layer)(tiny_llava()),
        ):
            pass

    def test_unknown_normalisation(self) -> None:
        with pytest.raises(ScoreError, match="prompt"):
            pore.Scored(4, Head(), normalize="image")  # type: ignore[arg-type]


def test_it_cannot_be_set_up_without_a_scorer() -> None:
    assert methods()["Scored"].usual(64, model_shape("llava-1.5-7b")) is None


def test_higher_is_kept_first() -> None:
    model = tiny_llava()
    wanted = [1, 4, 15]
    scores = torch.zeros(1, N).index_fill(1, torch.tensor(wanted), 1.0)
    with torch.no_grad(), pore.Scored(3, lambda *_: scores)(model) as run:
        model(**TestBadInput.inputs)
    assert list(run.report.samples[0].images[0].kept) == wanted


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("layer", [0, 2])
def test_whole_numbers_and_truth_values_are_scores(dtype: torch.dtype, layer: int) -> None:
    """Ragged images too, whose filling has no score."""
    model, inputs = tiny_llava(), batch(PROMPTS)
    wanted = {1, 4, 7, 15}

    def scorer(states: Tensor, layout: Layout, _: Tensor | None) -> Tensor:
        return torch.isin(layout.raster, torch.tensor([*wanted])).to(dtype)

    with torch.no_grad(), pore.Scored(len(wanted), scorer, layer)(model) as run:
        model(**inputs)
    for sample in run.report:
        assert all(set(image.kept) == wanted for image in sample.images)


def test_complex_scores_are_refused() -> None:
    def scorer(states: Tensor, layout: Layout, _: Tensor | None) -> Tensor:
        return torch.zeros(layout.valid.shape, dtype=torch.complex64)

    model = tiny_llava()
    with pore.Scored(4, scorer)(model), pytest.raises(ScoreError, match="real numbers"):
        model(**batch(PROMPTS))
