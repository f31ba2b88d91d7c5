"""Sorting, packing, taking and comparing rows of tensors, as needed in many places."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def widened(values: Tensor) -> Tensor:
    """The same values in float32, or in the wider type that they have: half precision is summed
    and compared in float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def unit(features: Tensor) -> Tensor:
    """Features (..., D) scaled to length 1, at least float32; one of length 0 stays 0."""
    return normalize(widened(features), dim=-1)


@torch.no_grad()
def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Cosine similarity between all pairs of tokens of two sets; 0 where a token is all zeros.

    Tokens are chosen by it, so it has no graph.

    Args:
        one: (I, a, d) tokens.
        other: (I, b, d) tokens.

    Returns:
        (I, a, b) similarities, at least float32.
    """
    return unit(one) @ unit(other).mT


def marked_first(mask: Tensor) -> Tensor:
    """The positions of every row, first those that are marked, then the others, both ascending.

    Args:
        mask: (I, n) bool.

    Returns:
        (I, n) positions: [1, 3, 0, 2] for [False, True, False, True].
    """
    return (~mask).long().argsort(dim=-1, stable=True)


def pack(mask: Tensor, right: bool = True, width: int | None = None) -> tuple[Tensor, Tensor]:
    """The positions marked in every row, ascending, filled up to a common length.

    Args:
        mask: (I, n) bool.
        right: Whether shorter rows are filled on the right; on the left, the last marked position
            of every row stays last.
        width: The length, at least the largest number of marks in a row; None takes that number,
            which waits for the device.

    Returns:
        index (I, width), the positions; and valid (I, width) bool, False at filling.
    """
    width = int(mask.sum(-1).max()) if width is None else width
    if right:
        index = marked_first(mask)[:, :width]
    else:
        index = marked_first(~mask)[:, mask.shape[1] - width :]
    return index, mask.gather(-1, index)


def inverse(order: Tensor) -> Tensor:
    """The place that every position (..., n) has in an order (..., n) of them: its rank."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def take(states: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """Take positions along one dimension of a tensor whose batch may be broadcast.

    Args:
        states: (..., B or 1, L, ...), such as states (B, L, D) or rotary tables (3, B, L, d).
        index: (B, M) positions, for each sample.
        dim: The dimension of length L; the one before it is the batch.

    Returns:
        The states at the positions, with the batch expanded to B: (B, M, D) of (B, L, D).
    """
    index = index.to(states.device)
    dim = dim % states.dim()
    batch_dim = dim - 1
    sizes = list(states.shape)
    sizes[batch_dim] = index.shape[0]
    states = states.expand(sizes)
    shape = [1] * states.dim()
    shape[batch_dim], shape[dim] = index.shape
    sizes[dim] = index.shape[1]
    return states.gather(dim, index.view(shape).expand(sizes))
