"""Clusters of tokens by density peaks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pore.tensors.gathering import widened
from pore.tensors.selection import by_score


@torch.no_grad()
def density_peaks(
    x: Tensor,
    counts: Sequence[int],
    valid: Tensor,
    noise: Tensor | None = None,
    neighbours: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cluster by density peaks with the nearest neighbours as density (DPC-KNN).

    A token is dense if its nearest tokens, itself included, are near. The centres are the c tokens
    that are dense and far from denser ones; every other token joins the nearest centre.

    Args:
        x: (I, m, D) features.
        counts: Clusters c of every image, at most as many as it has tokens.
        valid: (I, m) bool, False at what is no token of the image.
        noise: (I, m) in [0, 1): the authors add a millionth of such random numbers to the density,
            which then decides between equals (with two clusters, any two tokens that are each
            other's nearest). None takes the first of equals instead.
        neighbours: How many of the nearest tokens make a token of every image dense, all where
            there are fewer; None takes c.

    Returns:
        (I, m) the cluster of every token, numbered by how central its centre is; and the centres,
        (I, max(counts)), of which only the first c of an image are used.
    """
    m, count = x.shape[1], torch.tensor(counts, device=x.device)[:, None]
    near_by = count
    if neighbours is not None:
        wanted = torch.tensor(neighbours, device=x.device)[:, None]
        near_by = torch.minimum(wanted, valid.sum(-1, keepdim=True))
    x = widened(x)
    # Computed pair by pair, so that distances are symmetric and equal densities are equal.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance / math.sqrt(x.shape[-1])
    both = valid[:, :, None] & valid[:, None]
    slots = torch.arange(m, device=x.device)

    near = distance.masked_fill(~both, torch.inf).sort(-1).values
    near = near.masked_fill(slots >= near_by[..., None], 0.0)
    density = -near.square().sum(-1) / near_by.clamp(min=1)  # its logarithm
    if noise is not None:
        density = (density.exp() + noise * 1e-6).log()
    one, other = density[:, :, None], density[:, None]
    denser = (other > one) | ((other == one) & (slots < slots[:, None]))
    farthest = distance.masked_fill(~both, 0.0).amax((1, 2))[:, None]
    gap = distance.masked_fill(~(denser & both), torch.inf).amin(-1)
    gap = torch.where(gap.isinf(), farthest, gap)

    centres = by_score(gap.log() + density, valid)[:, : max(counts)]
    numbers = slots[: centres.shape[1]].expand_as(centres)
    real = numbers < count
    to = distance.gather(2, centres[:, None].expand(-1, m, -1))
    nearest = to.masked_fill(~real[:, None], torch.inf).sort(dim=-1, stable=True).indices[..., 0]
    own = torch.where(real, numbers, nearest.gather(1, centres))
    return nearest.scatter(1, centres, own), centres
