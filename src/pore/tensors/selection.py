"""From scores to the visual tokens that are kept: pure tensor functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pore.errors import BudgetError, ScoreError
from pore.tensors.gathering import inverse, marked_first

_NOT_FINITE = (
    "{} hold NaN or infinity, so no tokens can be chosen; look for overflow in the model (fp16 "
    "where it needs bf16?) or for damaged weights or inputs."
)


def check_finite(*scores: Tensor, what: str = "Scores") -> None:
    """Refuse scores by which nothing can be chosen, for methods that do not end in `top_k`.

    Args:
        scores: Any shapes.
        what: What they are called in the message, if they are not scores.

    Raises:
        ScoreError: One is NaN or infinite.
    """
    if not bool(torch.stack([torch.isfinite(one).all() for one in scores]).all()):
        raise ScoreError(_NOT_FINITE.format(what))


def check_features(features: Tensor, valid: Tensor) -> None:
    """Refuse visual tokens that hold NaN or infinity; waits for the device.

    Args:
        features: (I, t, D) what a method chooses among.
        valid: (I, t) bool, False where an image has fewer tokens.

    Raises:
        ScoreError: A token holds NaN or infinity.
    """
    if not bool((torch.isfinite(features).all(-1) | ~valid).all()):
        raise ScoreError(_NOT_FINITE.format("Visual tokens"))


def check_keep(keep: int | float) -> None:
    """Refuse a `keep` that makes no sense, before any model runs.

    Args:
        keep: Tokens kept per image (an `int` of at least 1), or the fraction kept (a `float` in
            (0, 1]).

    Raises:
        BudgetError: `keep` is zero, negative, not finite, a fraction above one, or not a number.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise BudgetError(
            f"keep must be an int (tokens per image) or a float (fraction kept), not {keep!r}."
        )
    if isinstance(keep, int):
        if keep < 1:
            raise BudgetError(f"keep={keep} would keep no visual token; ask for at least 1.")
    elif not math.isfinite(keep) or not 0.0 < keep <= 1.0:
        raise BudgetError(
            f"keep={keep!r} is not a fraction in (0, 1]; for a number of tokens pass an int."
        )


def budget(keep: int | float, available: int) -> int:
    """The number of tokens that `keep` means for an image of `available` visual tokens.

    A fraction is rounded half to even, as FastV's authors do.

    Args:
        keep: Tokens per image (`int`) or fraction kept (`float`).
        available: Visual tokens the image has.

    Returns:
        The number of tokens to keep, between 1 and `available`.

    Raises:
        BudgetError: More tokens are asked for than there are, or the fraction rounds to none.
    """
    check_keep(keep)
    count = keep if isinstance(keep, int) else round(keep * available)
    if count > available:
        raise BudgetError(
            f"keep={keep} asks for more visual tokens than there are ({available}); "
            f"ask for at most {available}, or for a fraction."
        )
    if count < 1:
        raise BudgetError(
            f"keep={keep} of {available} visual tokens rounds to none; "
            f"ask for at least {1 / available:.3g}."
        )
    return count


def truncated(keep: int | float, available: int) -> int:
    """`keep` as code counts it that is told the share q that goes: int(available * (1 - q)).

    In floating point 1 - q is not always what 1 - `keep` means: 1 - 0.9 of 100 tokens are 9, but
    0.1 of them are 10. So q is read off as the decimal number that one would write for it.

    Args:
        keep: Tokens (`int`), or the fraction kept (`float`), as 1 - q or as a decimal number.
        available: Tokens that there are.

    Returns:
        The number of tokens to keep, from 0 to `available`.

    Raises:
        BudgetError: More tokens are asked for than there are.
    """
    if isinstance(keep, int):
        return budget(keep, available)
    share = 1 - round(1 - keep, 12)
    written = abs(share - keep) < 2**-50  # the same but for the rounding of 1 - q
    return int(available * (share if written else keep))


def check_scores(scores: Tensor, counts: Tensor, valid: Tensor) -> None:
    """Refuse scores from which this many tokens cannot be chosen; waits once for the device.

    Args:
        scores: (I, n) scores; entries that are not `valid` are ignored.
        counts: (I,) how many tokens of each row are to be kept.
        valid: (I, n) bool, False where a shorter row is filled up.

    Raises:
        BudgetError: A row has fewer valid entries than its count.
        ScoreError: A valid score is NaN or infinite, or scores are complex and have no order.
    """
    if scores.is_complex():
        raise ScoreError(f"Scores must be real numbers, not {scores.dtype}.")
    finite = (torch.isfinite(scores) | ~valid).all()
    enough = (counts <= valid.sum(-1)).all()
    if bool(finite & enough):
        return
    if not bool(finite):
        raise ScoreError(_NOT_FINITE.format("Scores"))
    raise BudgetError(
        f"Asked to keep {counts.tolist()} tokens where only {valid.sum(-1).tolist()} remain."
    )


def proportional_shares(total: int, weights: Sequence[int], room: Sequence[int]) -> list[int]:
    """Share a number out in proportion to weights, as far as there is room.

    What is left over goes to the largest remainders; of equal ones, to the first. What does not fit
    is shared out again among those with room: by weight, and by room once all with weight are full.

    Args:
        total: What to share out.
        weights: The weight of each.
        room: The most that each can take.

    Returns:
        The shares; they sum to `total`.

    Raises:
        BudgetError: There is not enough room for all of it.
    """
    if total > sum(room):
        raise BudgetError(f"Asked to keep {total} visual tokens where only {sum(room)} remain.")
    shares = [0] * len(room)
    while left := total - sum(shares):
        free = [most - share for most, share in zip(room, shares, strict=True)]
        parts = [weight if more else 0 for weight, more in zip(weights, free, strict=True)]
        parts = parts if any(parts) else free
        each = [left * part // sum(parts) for part in parts]
        rest = [left * part % sum(parts) for part in parts]
        for i in sorted(range(len(parts)), key=lambda i: -rest[i])[: left - sum(each)]:
            each[i] += 1
        shares = [s + min(e, f) for s, e, f in zip(shares, each, free, strict=True)]
    return shares


def top_k(scores: Tensor, counts: Sequence[int] | Tensor, valid: Tensor | None = None) -> Tensor:
    """Mark the highest scores of every row; of equal scores the earlier one wins.

    Args:
        scores: (I, n) scores of any real type, whole numbers and truth values too; higher is kept
            first. Entries that are not `valid` are ignored.
        counts: How many to mark in each of the I rows.
        valid: (I, n) bool, False where a shorter row is filled up; None means all are valid.

    Returns:
        (I, n) bool, True at exactly `counts[i]` entries of row i.

    Raises:
        BudgetError: A row has fewer valid entries than its count.
        ScoreError: A valid score is NaN or infinite, or scores are complex.
    """
    counts = torch.as_tensor(counts, device=scores.device)
    if valid is None:
        valid = torch.ones_like(scores, dtype=torch.bool)
    check_scores(scores, counts, valid)
    return inverse(by_score(scores, valid)) < counts[:, None]


def by_score(scores: Tensor, valid: Tensor) -> Tensor:
    """The entries of every row by falling score; of equal scores the earlier comes first.

    Args:
        scores: (I, n) scores of any real type.
        valid: (I, n) bool, False at entries that come last, whatever their score.

    Returns:
        (I, n) positions.
    """
    # Stable sorts keep the order of equal entries; whole numbers have no -inf for what is ignored.
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order.gather(-1, marked_first(valid.gather(-1, order)))


def indices(mask: Tensor) -> list[list[int]]:
    """The positions marked in every row, in ascending order.

    Args:
        mask: (I, n) bool.

    Returns:
        I lists of positions.
    """
    return [row.nonzero().flatten().tolist() for row in mask.cpu()]


def even_shares(total: int, room: Sequence[int]) -> list[int]:
    """Share a number out as evenly as room allows, larger shares to the first.

    Args:
        total: What to share out, at most the sum of `room`.
        room: The most that each can take.

    Returns:
        The shares; they sum to `total`.
    """
    shares = [0] * len(room)
    left = total
    while left > 0:
        open_ = [i for i, most in enumerate(room) if shares[i] < most]
        each = max(left // len(open_), 1)
        for i in open_[:left]:
            more = min(each, room[i] - shares[i], left)
            shares[i] += more
            left -= more
    return shares
