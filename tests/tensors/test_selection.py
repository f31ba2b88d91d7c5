"""Selection as a pure function: budgets met exactly, order and scale of no account."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pore.errors import BudgetError, ScoreError
from pore.tensors.selection import budget, indices, proportional_shares, top_k, truncated

rows = st.integers(1, 4)
widths = st.integers(1, 24)


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Distinct scores (I, n), a count for every row, and which entries are valid."""
    count, width = draw(rows), draw(widths)
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.stack([torch.randperm(width, generator=generator) for _ in range(count)])
    lengths = [draw(st.integers(1, width)) for _ in range(count)]
    valid = torch.arange(width) < torch.tensor(lengths)[:, None]
    counts = [draw(st.integers(1, length)) for length in lengths]
    return scores.double() + 1, counts, valid


@given(problems())
def test_budget_is_exact_and_the_best_are_kept(problem: tuple) -> None:  # type: ignore[type-arg]
    scores, counts, valid = problem
    kept = top_k(scores, counts, valid)
    assert kept.sum(-1).tolist() == counts
    assert not (kept & ~valid).any()
    for row, (mask, ok) in enumerate(zip(kept, valid, strict=True)):
        left = scores[row][ok & ~mask]
        assert left.numel() == 0 or scores[row][mask].min() > left.max()
    for row in indices(kept):
        assert row == sorted(set(row))


@given(problems(), st.floats(1e-6, 1e6))
def test_scale_does_not_matter(problem: tuple, scale: float) -> None:  # type: ignore[type-arg]
    scores, counts, valid = problem
    assert torch.equal(top_k(scores, counts, valid), top_k(scores * scale, counts, valid))


@given(problems())
def test_what_is_not_valid_does_not_matter(problem: tuple) -> None:  # type: ignore[type-arg]
    scores, counts, valid = problem
    noise = scores.masked_fill(~valid, float("nan"))
    assert torch.equal(top_k(scores, counts, valid), top_k(noise, counts, valid))


@given(problems(), st.randoms(use_true_random=False))
def test_moves_with_its_tokens(problem: tuple, random: object) -> None:  # type: ignore[type-arg]
    scores, counts, valid = problem
    order = list(range(scores.shape[1]))
    random.shuffle(order)  # type: ignore[attr-defined]
    moved = top_k(scores[:, order], counts, valid[:, order])
    assert torch.equal(moved, top_k(scores, counts, valid)[:, order])


def test_of_equal_scores_the_earlier_wins() -> None:
    assert indices(top_k(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]), [2])) == [[1, 2]]


@given(st.integers(1, 4096), st.floats(0, 1, exclude_min=True))
def test_fraction_is_rounded_half_to_even(available: int, keep: float) -> None:
    if round(keep * available) < 1:
        with pytest.raises(BudgetError, match="rounds to none"):
            budget(keep, available)
    else:
        assert budget(keep, available) == round(keep * available)


def test_authors_counts() -> None:
    """FastV's published fractions of 576 tokens."""
    assert [budget(1 - r, 576) for r in (0.5, 0.75, 0.778, 0.9)] == [288, 144, 128, 58]
    assert budget(0.25, 50) == 12


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite(bad: float) -> None:
    with pytest.raises(ScoreError, match="NaN or infinity"):
        top_k(torch.tensor([[1.0, bad, 0.0]]), [1])


def test_more_than_there_are() -> None:
    valid = torch.tensor([[True, False, True]])
    with pytest.raises(BudgetError, match=r"keep \[3\] tokens where only \[2\]"):
        top_k(torch.rand(1, 3), [3], valid)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=5), st.data()
)
def test_shares_are_in_proportion_as_far_as_there_is_room(
    cases: list[tuple[int, int]], data: st.DataObject
) -> None:
    weights, room = map(list, zip(*cases, strict=True))
    total = data.draw(st.integers(0, sum(room)))
    shares = proportional_shares(total, weights, room)
    assert sum(shares) == total
    assert all(0 <= share <= most for share, most in zip(shares, room, strict=True))
    exact = [total * weight / max(sum(weights), 1) for weight in weights]
    if sum(weights) and all(e + 1 <= most for e, most in zip(exact, room, strict=True)):
        assert all(abs(share - e) < 1 for share, e in zip(shares, exact, strict=True))


def test_shares_that_find_no_room_go_to_the_others() -> None:
    assert proportional_shares(10, [2, 1, 1], [9, 9, 9]) == [5, 3, 2]
    assert proportional_shares(10, [8, 1, 1], [2, 9, 9]) == [2, 4, 4]
    assert proportional_shares(10, [1, 0, 0], [4, 8, 4]) == [4, 4, 2]
    with pytest.raises(BudgetError, match="only 5 remain"):
        proportional_shares(6, [1, 1], [2, 3])


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool, torch.float16, torch.bfloat16])
@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 999), st.data())
def test_scores_of_every_real_type(
    dtype: torch.dtype, images: int, n: int, seed: int, data: st.DataObject
) -> None:
    """Whole numbers and truth values rank as the same numbers in float64 do, ends of ranges too."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (images, n), generator=generator).to(dtype)
    valid = torch.rand(images, n, generator=generator) < 0.7
    if dtype in INTEGERS:
        scores[:, 0], scores[:, -1] = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    counts = [data.draw(st.integers(0, int(row.sum()))) for row in valid]
    got = top_k(scores, counts, valid)
    for row, ok, count, marked in zip(scores.tolist(), valid, counts, got, strict=True):
        places = [i for i in range(n) if ok[i]]
        expected = sorted(places, key=lambda i: (-float(row[i]), i))[:count]
        assert marked.nonzero()[:, 0].tolist() == sorted(expected)


def test_numbers_too_large_for_float64_are_told_apart() -> None:
    scores = torch.tensor([[2**60, 2**60 + 1, 2**60 + 2]])
    assert top_k(scores, [1]).tolist() == [[False, False, True]]


def test_complex_scores_are_refused() -> None:
    with pytest.raises(ScoreError, match="real numbers"):
        top_k(torch.zeros(1, 3, dtype=torch.complex64), [1])


def test_what_is_not_valid_may_be_nan() -> None:
    scores = torch.tensor([[float("nan"), 1.0, 2.0, float("inf")]])
    valid = torch.tensor([[False, True, True, False]])
    assert top_k(scores, [1], valid).tolist() == [[False, False, True, False]]


def test_truncated_counts_as_code_that_is_told_what_goes() -> None:
    """Whether the share kept is computed from the share that goes or written out, to the last bit;
    and whole numbers stay what they are."""
    for available in range(1, 121):
        for digits in (100, 1000):
            for going in range(digits):
                expected = int(available * (1 - going / digits))
                assert truncated(1 - going / digits, available) == expected
                assert truncated((digits - going) / digits, available) == expected
        assert [truncated(keep, available) for keep in range(1, available + 1)] == list(
            range(1, available + 1)
        )
        with pytest.raises(BudgetError, match=f"more visual tokens than there are .{available}."):
            truncated(available + 1, available)


@given(st.integers(1, 60), st.integers(1, 60))
def test_truncated_of_shares_that_are_no_decimal_numbers(parts: int, available: int) -> None:
    for going in range(parts):
        expected = int(available * (1 - going / parts))
        assert truncated(1 - going / parts, available) == expected
