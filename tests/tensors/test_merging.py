"""Merging as pure functions, against the same things written out token by token."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pore.tensors.gathering import cosine, pack
from pore.tensors.merging import (
    add_group_means,
    add_neighbours,
    bipartite_matching,
    nearest,
    strided,
    weighted_sum,
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (I, n, 5), metric (I, n, 3), tokens to merge (I, n), how many they become (I,)."""
    images, n = draw(st.integers(1, 3)), draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    features = torch.randn(images, n, 5, generator=generator, dtype=torch.float64)
    metric = torch.randn(images, n, 3, generator=generator, dtype=torch.float64)
    others = torch.rand(images, n, generator=generator) < draw(st.floats(0.0, 1.0))
    counts = [draw(st.integers(0, most)) for most in others.sum(1).tolist()]
    return features, metric, others, torch.tensor(counts)


@given(problems())
def test_strided_marks_as_many_as_asked_for(problem: tuple[Tensor, ...]) -> None:
    _, _, others, counts = problem
    marks = strided(others, counts)
    for tokens, count, marked in zip(others, counts.tolist(), marks, strict=True):
        order = tokens.nonzero()[:, 0].tolist()
        expected = order[:: max(1, len(order) // count)][:count] if count else []
        assert marked.nonzero()[:, 0].tolist() == expected


@given(problems())
def test_groups_are_those_of_the_most_similar_target(problem: tuple[Tensor, ...]) -> None:
    features, metric, others, counts = problem
    if int(counts.max()) == 0:
        return
    marks = strided(others, counts)
    targets, valid = pack(marks)
    group = nearest(metric, targets, valid)
    merged, sizes = add_group_means(features, targets, group, others & ~marks)
    for i, count in enumerate(counts.tolist()):
        own = targets[i, :count].tolist()
        assert own == marks[i].nonzero()[:, 0].tolist()
        if count == 0:
            continue
        members: dict[int, list[Tensor]] = {j: [] for j in range(count)}
        for token in (others & ~marks)[i].nonzero()[:, 0].tolist():
            similarity = torch.cosine_similarity(metric[i, token][None], metric[i, own])
            best = int(group[i, token])
            assert best < count
            torch.testing.assert_close(similarity[best], similarity.max())
            members[best].append(features[i, token])
        for j, token in enumerate(own):
            expected = features[i, token]
            if members[j]:
                expected = expected + torch.stack(members[j]).mean(0)
            torch.testing.assert_close(merged[i, j], expected)
            assert sizes[i, j] == len(members[j])


@given(problems(), st.floats(1e-3, 1e3))
def test_the_scale_of_the_metric_does_not_matter(problem: tuple[Tensor, ...], scale: float) -> None:
    _, metric, _, _ = problem
    lengths = torch.linspace(0.5, 2.0, metric.shape[1], dtype=metric.dtype)[:, None]
    expected = cosine(metric, metric)
    torch.testing.assert_close(cosine(metric * scale * lengths, metric), expected)


def test_zeros_are_like_nothing() -> None:
    zeros, other = torch.zeros(1, 2, 3), torch.ones(1, 1, 3)
    assert torch.equal(cosine(zeros, other), torch.zeros(1, 2, 1))


def test_types() -> None:
    half = torch.randn(1, 4, 3).half()
    assert cosine(half, half).dtype == torch.float32
    group = torch.zeros(1, 4, dtype=torch.long)
    members = torch.tensor([[False, True, True, True]])
    merged, _ = add_group_means(half, torch.tensor([[0]]), group, members)
    assert merged.dtype == torch.float16


@given(problems(), st.integers(0, 40), st.integers(0, 2**31))
def test_neighbours_are_the_most_similar(
    problem: tuple[Tensor, ...], neighbours: int, seed: int
) -> None:
    features, metric, others, counts = problem
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(others.shape, generator=generator, dtype=torch.float64)
    left = torch.rand(others.shape, generator=generator).masked_fill(others, 2.0).argsort(-1)
    counts = torch.minimum(counts, (~others).sum(1))  # those kept are none of the others
    kept = left[:, : int(counts.max())]
    valid = torch.arange(kept.shape[1]) < counts[:, None]
    got = add_neighbours(features, metric, weights, kept, valid, others, neighbours)
    for i, count in enumerate(counts.tolist()):
        own = kept[i, :count].tolist()
        for slot, token in enumerate(own):
            pool = [x for x in own if x != token] + others[i].nonzero()[:, 0].tolist()
            similarity = torch.cosine_similarity(metric[i, token][None], metric[i, pool])
            best = [pool[j] for j in similarity.argsort(descending=True)[:neighbours].tolist()]
            expected = features[i, token] + weights[i, best] @ features[i, best]
            torch.testing.assert_close(got[i, slot], expected)
    assert bool(got.isfinite().all())


def test_a_token_kept_twice_is_its_own_neighbour() -> None:
    features = torch.tensor([[[1.0], [10.0], [100.0]]])
    metric = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]])
    weights, others = torch.ones(1, 3), torch.tensor([[False, True, True]])
    kept, valid = torch.tensor([[0, 0]]), torch.ones(1, 2, dtype=torch.bool)
    got = add_neighbours(features, metric, weights, kept, valid, others, 1)
    assert got.flatten().tolist() == [2.0, 2.0]


def test_weighted_sum() -> None:
    features = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [torch.pi, 1.0]]])
    tokens = torch.tensor([[True, True, False]])
    got = weighted_sum(features, torch.tensor([[2.0, 0.5, 9.0]]), tokens)
    assert got.tolist() == [[[3.5, 6.0]]]


@given(st.integers(1, 3), st.integers(2, 24), st.integers(0, 2), st.integers(0, 999), st.data())
def test_matching(images: int, n: int, protected: int, seed: int, data: st.DataObject) -> None:
    """Against the same, token by token; two protected ones are CLS and a distillation token."""
    cls, distill = protected > 0, protected > 1
    count = data.draw(st.integers(0, max(n - protected, 0) // 2))
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(images, n, 3, generator=generator, dtype=torch.float64)
    states = torch.randn(images, n, 2, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 5, (images, n), generator=generator)
    matching = bipartite_matching(metric, count, cls, distill)
    means, sums = matching.means(states, sizes), matching.sums(sizes[..., None])
    assert means.shape == (images, n - count, 2)
    for i in range(images):
        even, odd = list(range(2 * cls, n, 2)), list(range(1 + 2 * distill, n, 2))
        similar = torch.cosine_similarity(metric[i, :, None], metric[i, None], -1)
        near = {a: odd[int(similar[a, odd].argmax())] for a in even if odd}
        ranked = sorted(near, key=lambda a: -similar[a, near[a]].item())
        merged, stay = ranked[:count], ranked[count:]
        assert matching.source[i].tolist() == merged
        groups = {x: [x] for x in range(n) if x not in merged}
        for a in merged:
            groups[near[a]].append(a)
        places = matching.places[i].tolist()
        if count == 0:
            assert places == list(range(n))
        elif odd:
            first = list(range(protected)) + (sorted(stay) if cls else stay)
            assert places == first + odd
        for slot, place in enumerate(places):
            weights = sizes[i, groups[place]].double()
            mean = weights @ states[i, groups[place]] / weights.sum()
            torch.testing.assert_close(means[i, slot], mean)
            assert sums[i, slot, 0] == int(weights.sum())


@given(st.integers(2, 24), st.floats(1e-3, 1e3), st.integers(0, 999))
def test_matching_does_not_mind_the_scale(n: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(1, n, 3, generator=generator, dtype=torch.float64)
    one, other = (bipartite_matching(metric * s, n // 4, True) for s in (1.0, scale))
    assert torch.equal(one.places, other.places)
    assert torch.equal(one.target, other.target)
