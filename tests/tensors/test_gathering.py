"""Rows packed, taken, ranked and compared, against the same things done row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pore.tensors.gathering import cosine, inverse, marked_first, pack, take, unit, widened
from pore.tensors.selection import by_score


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.rand(rows, width, generator=generator) < draw(st.floats(0.0, 1.0))


def marked(row: Tensor) -> list[int]:
    return [i for i, mark in enumerate(row.tolist()) if mark]


@given(masks(), st.booleans(), st.integers(0, 3))
def test_pack(mask: Tensor, right: bool, more: int) -> None:
    most = max(len(marked(row)) for row in mask)
    width = min(most + more, mask.shape[1])
    index, valid = pack(mask, right, width)
    assert index.shape == valid.shape == (len(mask), width)
    for row, places, own in zip(mask, index, valid, strict=True):
        expected, count = marked(row), len(marked(row))
        assert places[own].tolist() == expected
        left = 0 if right else width - count
        assert own.tolist() == [left <= i < left + count for i in range(width)]
    for one, other in zip(pack(mask, right), pack(mask, right, most), strict=True):
        assert torch.equal(one, other)


@given(masks())
def test_marked_come_first(mask: Tensor) -> None:
    for row, order in zip(mask, marked_first(mask).tolist(), strict=True):
        others = [i for i in range(len(row)) if not row[i]]
        assert order == marked(row) + others


@given(masks(), st.integers(0, 2**31))
def test_order_by_score(valid: Tensor, seed: int) -> None:
    scores = torch.randint(0, 3, valid.shape, generator=torch.Generator().manual_seed(seed))
    for kind in (torch.int64, torch.float32):
        given = scores.to(kind)
        if kind.is_floating_point:
            given = given.masked_fill(~valid, torch.nan)
        order = by_score(given, valid)
        for row, own, got in zip(scores.tolist(), valid, order.tolist(), strict=True):
            expected = sorted(marked(own), key=lambda i: -row[i])
            assert got[: len(expected)] == expected
            assert sorted(got) == list(range(len(row)))
        assert torch.equal(inverse(order).gather(-1, order)[0], torch.arange(valid.shape[1]))


@pytest.mark.parametrize("batch", [1, 2])
def test_take(batch: int) -> None:
    """Of a batch that may be broadcast, with or without planes before it."""
    states, index = torch.randn(batch, 5, 3), torch.tensor([[4, 0], [1, 1]])
    whole = states.expand(2, -1, -1)
    assert torch.equal(take(states, index), torch.stack([whole[0][[4, 0]], whole[1][[1, 1]]]))
    planes = torch.stack([states[..., 0], states[..., 1]])
    assert torch.equal(take(planes, index, 2)[1], take(states, index)[..., 1])


def test_half_precision_is_compared_in_float32() -> None:
    half, double = torch.randn(1, 3, 4).half(), torch.randn(1, 3, 4).double()
    assert widened(half).dtype == unit(half).dtype == cosine(half, half).dtype == torch.float32
    assert widened(double) is double
    torch.testing.assert_close(unit(half).norm(dim=-1), torch.ones(1, 3))
    assert torch.equal(unit(torch.zeros(1, 2)), torch.zeros(1, 2))


def test_likeness_has_no_graph() -> None:
    features = torch.randn(1, 3, 4, requires_grad=True)
    assert not cosine(features, features).requires_grad
