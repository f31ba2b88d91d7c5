"""Pure tensor functions that merge many tokens into few.

Sums over tokens are matrix products with 0-1 weights, not scattered additions, so that they give
the same bits every time on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pore.tensors.gathering import cosine, take, widened

# -- towards targets by similarity (VisionZip) -----------------------------------------------------


def strided(tokens: Tensor, counts: Tensor) -> Tensor:
    """Mark tokens at even distances: the first, and every (M // count)-th of M after it.

    Args:
        tokens: (I, n) bool, the tokens to choose from.
        counts: (I,) how many of each row to mark, at most as many as there are.

    Returns:
        (I, n) bool, True at exactly `counts[i]` entries of row i.
    """
    counts = counts[:, None]
    step = (tokens.sum(-1, keepdim=True) // counts.clamp(min=1)).clamp(min=1)
    place = tokens.cumsum(-1) - 1
    return tokens & (place % step == 0) & (place // step < counts)


def nearest(metric: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """The most similar target of every token, by cosine; of equals the first.

    Args:
        metric: (I, n, d) what similarity is measured on.
        targets: (I, c) positions of the targets, c at least 1.
        valid: (I, c) bool, False where a row has fewer.

    Returns:
        (I, n) which of the c targets.
    """
    similarity = cosine(metric, take(metric, targets))
    return similarity.masked_fill(~valid[:, None], -torch.inf).argmax(-1)


def add_group_means(
    features: Tensor, targets: Tensor, group: Tensor, members: Tensor
) -> tuple[Tensor, Tensor]:
    """Add to every target the mean of the tokens in its group.

    This is the sum of the target and that mean, not the mean of all, as in VisionZip's code.

    Args:
        features: (I, n, C) the tokens.
        targets: (I, c) positions of the targets.
        group: (I, n) which target each token goes to.
        members: (I, n) bool, the tokens that go to one; targets themselves do not.

    Returns:
        merged (I, c, C), and sizes (I, c), how many tokens went to each.
    """
    mean, sizes = group_means(features, group, members, targets.shape[1])
    return (take(widened(features), targets) + mean).to(features.dtype), sizes


def group_means(
    features: Tensor, group: Tensor, members: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The mean of every group of tokens.

    Args:
        features: (I, n, C) the tokens.
        group: (I, n) which group each belongs to.
        members: (I, n) bool, False at tokens of none.
        count: Number of groups c of the image that has most.

    Returns:
        means (I, c, C), at least float32, 0 for a group without tokens; and sizes (I, c).
    """
    wide = widened(features).masked_fill(~members[..., None], 0.0)
    numbers = torch.arange(count, device=group.device)
    weights = ((group[:, None] == numbers[:, None]) & members[:, None]).to(wide.dtype)
    sizes = weights.sum(-1)
    return weights @ wide / sizes.clamp(min=1)[..., None], sizes.long()


# -- into tokens that stay, from those most like them (PruMerge) -----------------------------------


def add_neighbours(
    features: Tensor,
    metric: Tensor,
    weights: Tensor,
    kept: Tensor,
    valid: Tensor,
    others: Tensor,
    neighbours: int,
) -> Tensor:
    """Add to every kept token the weighted sum of the tokens most like it, kept ones among them.

    All sums are of the features as they come in. Weights are not normalised.

    Args:
        features: (I, n, C) the tokens.
        metric: (I, n, d) what similarity is measured on, by cosine.
        weights: (I, n) of every token in a sum.
        kept: (I, k) positions of the kept tokens. One that is there twice is its own neighbour.
        valid: (I, k) bool, False where a row keeps fewer.
        others: (I, n) bool, the tokens besides that may be neighbours.
        neighbours: How many go into each sum; fewer where there are no more.

    Returns:
        (I, k, C) the kept tokens with what was added; arbitrary but finite where not `valid`.
    """
    count = kept.shape[1]
    itself = torch.eye(count, count + features.shape[1], dtype=torch.bool, device=features.device)
    closed = ~torch.cat([valid, others], 1)[:, None] | itself
    chosen = take(metric, kept)
    similarity = cosine(chosen, torch.cat([chosen, metric], 1)).masked_fill(closed, -torch.inf)
    best = similarity.argsort(dim=-1, descending=True, stable=True)[..., :neighbours]
    taken = torch.zeros_like(closed).scatter_(2, best, True) & ~closed
    wide = widened(features)
    weights = torch.cat([weights.gather(1, kept), weights], 1).to(wide.dtype)
    start = take(wide, kept)
    added = (taken * weights[:, None]) @ torch.cat([start, wide], 1)
    return (start + added).to(features.dtype)


def weighted_sum(features: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
    """(I, 1, C) the sum of the `tokens` (I, n) of features (I, n, C) by weights (I, n)."""
    wide = widened(features)
    weights = (weights * tokens).to(wide.dtype)
    return (weights[:, None] @ wide).to(features.dtype)


# -- pairs of two halves (ToMe) --------------------------------------------------------------------


@dataclass(frozen=True)
class Matching:
    """Which tokens one round of merging merges into which.

    Attributes:
        places: (I, m) the token that each of the m left is or was merged into.
        source: (I, r) the tokens that are merged away.
        target: (I, r) which of the m tokens left each of them goes into.
    """

    places: Tensor
    source: Tensor
    target: Tensor

    def sums(self, states: Tensor) -> Tensor:
        """(I, m, C) the states (I, n, C) of the tokens left, with those merged into them added."""
        wide = widened(states)
        went = one_hot(self.target, self.places.shape[1]).to(wide.dtype)
        return take(wide, self.places) + went.mT @ take(wide, self.source)

    def means(self, states: Tensor, weights: Tensor) -> Tensor:
        """(I, m, C) means of the states (I, n, C) that come together, by weights (I, n)."""
        weights = widened(weights)[..., None]
        return (self.sums(widened(states) * weights) / self.sums(weights)).to(states.dtype)


def bipartite_matching(
    metric: Tensor, count: int, cls: bool = False, distill: bool = False
) -> Matching:
    """Match the tokens at even places with the most similar at odd places, and merge the best.

    ToMe's bipartite soft matching. Of the tokens at even places the `count` with the most similar
    partner, by cosine, are merged into it; several may go into one. What stays of the even places
    comes first: in order with a CLS token, else by descending similarity, as in the authors' code;
    then all of the odd ones. Where none is to be merged, all stay in their order.

    Args:
        metric: (I, n, d) what similarity is measured on.
        count: How many tokens to merge, at most half of those that may be.
        cls: Whether token 0 is a CLS token, which stays and takes no other.
        distill: Whether the token after it is a distillation token, likewise; it stays there.

    Returns:
        The matching, of m = n - count tokens.
    """
    if count == 0:
        places = torch.arange(metric.shape[1], device=metric.device).expand(len(metric), -1)
        return Matching(places, places[:, :0], places[:, :0])
    similarity = cosine(metric[:, ::2], metric[:, 1::2])
    if cls:
        similarity[:, 0] = -torch.inf
    if distill:
        similarity[..., 0] = -torch.inf
    best, partner = similarity.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    source, stay = order[:, :count], order[:, count:]
    if cls:
        stay = stay.sort(-1).values
    odd = torch.arange(similarity.shape[2], device=metric.device).expand(len(metric), -1)
    first, second = 2 * stay, 2 * odd + 1
    target = stay.shape[1] + partner.gather(1, source)
    if distill:  # CLS, the distillation token, then the others
        places = torch.cat([first[:, :1], second[:, :1], first[:, 1:], second[:, 1:]], 1)
    else:
        places = torch.cat([first, second], 1)
    return Matching(places, 2 * source, target)
