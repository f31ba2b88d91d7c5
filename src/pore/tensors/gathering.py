"""Rows and tokens gathered, packed and compared."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def cosine(features: Tensor) -> Tensor:
    """(J, m, m) cosine of all pairs of (J, m, D) features, at least float32."""
    unit = _unit(features)
    return torch.matmul(unit, unit.mT)


def _unit(features: Tensor) -> Tensor:
    return normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _packed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(I, R) the positions marked in every row of (I, L), ascending, and which of them are."""
    counts = mask.sum(-1, keepdim=True)
    index = (~mask).long().argsort(dim=-1, stable=True)[:, : int(counts.max())]
    return index, torch.arange(index.shape[1], device=mask.device) < counts


def _take(states: Tensor, index: Tensor) -> Tensor:
    """(I, k, D) the states (I, t, D) at index (I, k)."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


def working(states: Tensor) -> Tensor:
    """The same values in float32, or in the wider type that they have."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def compact(mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The positions marked in every row, side by side.

    Args:
        mask: (I, n) bool.
        width: The most that a row marks.

    Returns:
        index (I, width), ascending; and valid (I, width), False where a row marks fewer.
    """
    index = (~mask).long().argsort(dim=-1, stable=True)[:, :width]
    return index, mask.gather(1, index)


def gather(states: Tensor, index: Tensor) -> Tensor:
    """(I, k, C) the states (I, n, C) at positions (I, k)."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


def pack(kept: Tensor, right: bool) -> tuple[Tensor, Tensor]:
    """Choose the positions that a shortened batch keeps, filled up to a common length.

    Args:
        kept: (B, L) bool, True at the tokens that stay.
        right: Whether shorter rows are filled on the right, as a batch that is padded there; on the
            left the last token of every sample stays last.

    Returns:
        index (B, M), the old position of every new one, ascending among the kept; and
        valid (B, M) bool, False at filling.
    """
    counts = kept.sum(-1)
    length = int(counts.max())
    order = (~kept if right else kept).long().argsort(dim=-1, stable=True)
    index = order[:, :length] if right else order[:, order.shape[1] - length :]
    slots = torch.arange(length, device=kept.device)
    valid = slots < counts[:, None] if right else slots >= length - counts[:, None]
    return index, valid


def take(states: Tensor, index: Tensor, dim: int) -> Tensor:
    """Take positions along one dimension of a tensor whose batch may be broadcast.

    Args:
        states: (..., B or 1, ..., L, ...) with the batch in the dimension before or at the front.
        index: (B, M) positions, for each sample.
        dim: Dimension of length L; the batch is dimension 0, or 1 where a leading dimension holds
            the planes of a multi-dimensional rotary embedding.

    Returns:
        The states at the positions, with the batch expanded to B.
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
