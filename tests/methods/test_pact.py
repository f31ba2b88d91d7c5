"""PACT: importance, clusters, an exact number of them, and what attention counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pore
from helpers.engine import BATCHES
from helpers.golden_files import draw
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from helpers.recording import Recording
from pore.cost.named import model_shape
from pore.errors import BudgetError, UnsupportedModelError
from pore.methods.pact import (
    Clusters,
    assign,
    density,
    distances,
    exact_centres,
    greedy_centres,
    mean_query,
    merge,
)
from pore.tensors.gathering import inverse

LAYER = 2


def one_by_one(between: Tensor, rank: Tensor, cutoff: float) -> list[int]:
    """The centres, token by token from the densest."""
    centres: list[int] = []
    for token in rank.argsort().tolist():
        if all(float(between[token, centre]) > cutoff for centre in centres):
            centres.append(token)
    return sorted(centres)


def ranked(seed: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of n tokens, their distances and the rank of their density."""
    keys = draw(seed, n, 5).double()
    between = distances(keys, keys).fill_diagonal_(0.0)
    return keys, between, inverse(density(between).argsort(descending=True))


@settings(max_examples=60)
@given(st.integers(0, 999), st.integers(1, 30), st.floats(0, 2))
def test_centres_are_found_from_the_densest_down(seed: int, n: int, cutoff: float) -> None:
    _, between, rank = ranked(seed, n)
    found = greedy_centres(between, rank, cutoff).nonzero()[:, 0].tolist()
    assert found == one_by_one(between, rank, cutoff)


@settings(max_examples=60)
@given(st.integers(0, 999), st.integers(1, 30), st.data())
def test_any_number_of_centres(seed: int, n: int, data: st.DataObject) -> None:
    """Where a cutoff gives it, the centres are those of the cutoff; else the densest are added."""
    _, between, rank = ranked(seed, n)
    count = data.draw(st.integers(1, n))
    cutoff, centres = exact_centres(between, rank, count)
    assert int(centres.sum()) == count
    of_cutoff = greedy_centres(between, rank, cutoff)
    assert bool((centres | ~of_cutoff).all())
    added = centres & ~of_cutoff
    if added.any():
        assert rank[added].max() < rank[~centres].min() if bool((~centres).any()) else True


def test_equal_tokens_are_still_as_many_as_asked_for() -> None:
    between = torch.zeros(6, 6)
    rank = torch.tensor([3, 0, 4, 1, 5, 2])
    cutoff, centres = exact_centres(between, rank, 4)
    assert cutoff == 0
    assert centres.nonzero()[:, 0].tolist() == [0, 1, 3, 5]


@settings(max_examples=30)
@given(st.integers(0, 999), st.integers(2, 25), st.sampled_from([None, 0.0, 0.4, 5.0]))
def test_clusters_and_their_means(seed: int, n: int, reach: float | None) -> None:
    keys, states = draw(seed, n, 5).double(), draw(seed + 1, n, 3).double()
    on = torch.arange(0, n, 2)
    centres = on[::2]
    found = assign(keys, on, centres, reach)
    between = distances(keys, keys[centres]).tolist()
    near = {
        token: min(range(len(centres)), key=row.__getitem__) for token, row in enumerate(between)
    }
    members: dict[int, list[int]] = {c: [] for c in range(len(centres))}
    for token in range(n):
        own = centres.tolist().index(token) if token in centres.tolist() else near[token]
        far = between[token][own]
        joins = token % 2 == 0 if reach is None else far <= reach
        label = own if joins or token in centres.tolist() else -1
        assert int(found.labels[token]) == label
        if label >= 0:
            members[label].append(token)
    sizes = torch.rand(n, dtype=torch.float64)
    means, total = merge(states, sizes, found)
    for c, tokens in members.items():
        torch.testing.assert_close(means[c], states[tokens].mean(0))
        torch.testing.assert_close(total[c], sizes[tokens].sum())


def test_importance_is_that_of_the_mean_query() -> None:
    """Written out from the layer's own projections, without RoPE, up to the last visual token."""
    model, inputs = tiny_llava(), batch([prompt(3, 1, 5)])
    recording = Recording(pore.PACT(5, LAYER))
    with torch.no_grad(), recording(model):
        model(**inputs)
    seen = recording.seen[0].view
    layer = model.model.language_model.layers[LAYER]
    attention = layer.self_attn
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states[LAYER][0]
        normed = layer.input_layernorm(states)
        visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
        query, key = (
            project(normed[: int(visual.max()) + 1]).unflatten(-1, (-1, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj)
        )
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits = torch.einsum("hd,nhd->hn", query.mean(0), key) * attention.head_dim**-0.5
        expected = logits.softmax(-1).mean(0)[visual]
    torch.testing.assert_close(seen.attention.attention[0], expected)


def test_the_mean_is_over_the_window() -> None:
    query = draw(0, 1, 2, 4, 3)
    window = torch.tensor([[False, True, True, False]])
    torch.testing.assert_close(mean_query(query, window)[0, :, 0], query[0, :, 1:3].mean(1))


def sizes_of(pruner: pore.PACT, inputs: dict[str, Tensor]) -> tuple[Any, pore.Run]:
    recording = Recording(pruner)
    with torch.no_grad(), recording(tiny_llava()) as run:
        run.model(**inputs)
    return recording.seen[0].selection, run


def test_what_is_merged_is_counted() -> None:
    """Within an unlimited reach nothing is lost: sizes sum to the number of tokens."""
    inputs = batch(BATCHES["several images"])
    selection, _ = sizes_of(pore.PACT(5, LAYER, reach=1e9), inputs)
    totals = selection.sizes.masked_fill(~selection.keep, 0).sum(1)
    assert totals.tolist() == [N] * len(totals)
    selection, _ = sizes_of(pore.PACT(5, LAYER, proportional=False), inputs)
    assert selection.sizes is None
    assert selection.features is not None


def test_merging_twice_counts_the_tokens_of_both() -> None:
    chain = pore.Chain(pore.PACT(8, 1, 1.0, reach=1e9), pore.PACT(3, 3, 1.0, reach=1e9))
    recording = Recording(chain)
    with torch.no_grad(), recording(tiny_llava()) as run:
        run.model(**batch([prompt(3, 1, 5)]))
    selection = recording.seen[1].selection
    assert float(selection.sizes[selection.keep].sum()) == pytest.approx(N)


def test_a_cutoff_leaves_what_it_leaves() -> None:
    inputs = batch(BATCHES["several images"])
    counts = []
    for cutoff in (0.0, 0.3, 5.0):
        _, run = sizes_of(pore.PACT(cutoff=cutoff, layer=LAYER), inputs)
        counts.append([len(image.kept) for sample in run.report for image in sample.images])
    assert counts[0] == [int(0.55 * N)] * 4
    assert counts[2] == [1] * 4
    assert len(set(counts[1])) > 1


def test_faithful_takes_the_images_of_a_sample_together() -> None:
    inputs = batch(BATCHES["several images"])
    _, run = sizes_of(pore.PACT(cutoff=5.0, layer=LAYER, faithful=True), inputs)
    assert [sum(len(image.kept) for image in sample.images) for sample in run.report] == [1, 1]


def test_usual_scales_with_the_depth() -> None:
    assert pore.PACT.usual(64, model_shape("llava-1.5-7b")).layer == 5
    assert pore.PACT.usual(64, model_shape("llava-64x6")).layer == 1


def test_gradients_go_through_the_means() -> None:
    model, inputs = tiny_llava(), batch([prompt(3, 1, 5)])
    with pore.PACT(5, LAYER)(model):
        model(**inputs).logits[0, -1].sum().backward()
    grad = model.model.multi_modal_projector.linear_1.weight.grad
    assert grad is not None
    assert bool(grad.any())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either `keep`, or a `cutoff`"),
        ({"keep": 5, "cutoff": 0.2}, "either `keep`, or a `cutoff`"),
        ({"keep": 5, "faithful": True}, "give a `cutoff`"),
        ({"keep": 0}, "at least 1"),
        ({"keep": 5, "share": 0.0}, "not a share of the tokens"),
        ({"keep": 5, "share": float("nan")}, "not a share of the tokens"),
        ({"cutoff": -0.1}, "not a distance"),
        ({"keep": 5, "reach": float("nan")}, "not a distance"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        pore.PACT(**given)


def test_what_is_not_known_in_advance_is_refused() -> None:
    with pytest.raises(BudgetError, match="depends on the image"):
        pore.PACT(cutoff=0.2).counts(576, 32)
    with pytest.raises(BudgetError, match=r"share=0\.01 of 16"):
        sizes_of(pore.PACT(cutoff=0.2, layer=LAYER, share=0.01), batch([prompt(3, 1, 5)]))


def test_flash_attention_says_what_to_do() -> None:
    model = tiny_llava()
    model.model.language_model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match=r"'sdpa', or set proportional=False"):
        pore.PACT(5, LAYER)(model).__enter__()


def test_a_centre_stays_where_it_is() -> None:
    """A cluster's state goes to its densest token, not to its first."""
    states = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    means, _ = merge(states, torch.ones(3), Clusters(torch.tensor([1]), torch.zeros(3).long()))
    assert means.tolist() == [[1.0, 1.0]]
