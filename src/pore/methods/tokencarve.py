"""TokenCarve: keep tokens with attention and information, then merge similar ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pore.engine.corrections import Reweight
from pore.engine.readers import LastToken
from pore.engine.stages import Merges, Selection, Stage, View
from pore.errors import ScoreError
from pore.methods.scorer import ScoredPruner
from pore.tensors.gathering import cosine, inverse, pack, take, widened
from pore.tensors.selection import by_score, check_scores, top_k


@dataclass(frozen=True)
class TokenCarve(ScoredPruner):
    """Choose 1.5 times `keep` visual tokens, then merge the surplus (arXiv 2503.10501).

    Before layer K the tokens are ranked twice: by the attention of the last text token in layer
    K - 1, averaged over heads, and by how much each contributes to the singular vectors of the
    states entering layer K (`singular_scores`). In each ranking the best of N tokens gets N points
    and the last gets 1; the weighted sum of both decides. To keep 64 tokens, the best 96 are
    chosen. The better 48 of these stay. Of the other 48, the 32 that are most similar to one of the
    better half, by the cosine of their states, are merged into it: its new state is the mean of its
    own and all that join it. The last 16 stay as they are. All tokens keep their places and
    positions.

    With `reweight=P` the attention is divided by P before it is ranked (PoRe, arXiv 2508.17807).

    The number of tokens is exact, as in the authors' code. That code fails if `keep` is more than
    two thirds of the tokens; here all tokens are then chosen, and fewer are merged. Three things in
    it are not followed. Its scripts place the image one token late, so that the first patch always
    stays and the token after the image competes. It also shortens the caches of layers 0 and 1,
    while here layers before K keep their whole cache, so that decoding sees more. And it mistakes a
    prompt of fewer than 150 tokens for a decoding step.

    Of tokens with the same points the earlier one wins; the authors leave that to `topk`.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float), including merged ones.
        layer: K, the 0-based index of the first pruned layer.
        weight: Share of the attention in the points. 0 ranks by singular vectors alone (mode 1 of
            the authors), 1 by attention alone (their mode 2).
        reweight: The position bias P or another correction, or None.
    """

    weight: float = 0.5
    reweight: Reweight | None = None

    name: ClassVar[str] = "TokenCarve"
    paper: ClassVar[str] = "arXiv 2503.10501"
    merges: ClassVar[Merges] = "some"
    reweightable: ClassVar[bool] = True
    earliest: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight <= 1:
            raise ScoreError(f"weight is a share from 0 to 1, not {self.weight!r}.")
        if self.weight == 0 and self.reweight is not None:
            raise ScoreError(
                "With weight=0 attention does not count, so reweight has nothing to divide; "
                "leave one of the two out."
            )

    def reader(self) -> LastToken:
        """The last text token's attention."""
        return LastToken()

    def stages(self) -> Sequence[Stage]:
        """One stage, before layer K."""
        return [replace(stage, merges=True) for stage in super().stages()]

    def score(self, view: View) -> Tensor:
        """A, the attention of the last text token."""
        attention: Tensor = view.attention
        return attention

    def choose(self, view: View, scores: Tensor) -> Selection:
        """Rank by attention and singular vectors together, and merge."""
        features, valid = view.features, view.layout.valid
        counts = torch.tensor(view.budget(self.keep), device=valid.device)
        check_scores(scores, counts, valid)
        information = singular_scores(features, valid)
        points = self.weight * rank_points(scores, valid)
        points = points + (1 - self.weight) * rank_points(information, valid)
        order = by_score(points, valid)
        return Selection(*carve(features, order, counts, valid))


@torch.no_grad()
def singular_scores(features: Tensor, valid: Tensor) -> Tensor:
    """How much every token contributes to the singular vectors of all.

    With the states X = U S Vᵀ of one image's tokens, token i scores the sum over j of |U_ij| s_j.
    The states are neither centred nor scaled.

    Args:
        features: (I, t, D) states of the visual tokens.
        valid: (I, t) bool, False where a smaller image is filled up.

    Returns:
        (I, t) scores, at least float32; 0 where not `valid`.
    """
    scores = torch.zeros_like(widened(features[..., 0]))
    for row, states, there in zip(scores, widened(features), valid, strict=True):
        left, sizes, _ = torch.linalg.svd(states[there], full_matrices=False)
        row[there] = left.abs() @ sizes
    return scores


def rank_points(scores: Tensor, valid: Tensor) -> Tensor:
    """Points by rank: the best of N tokens gets N, the next N - 1, the last 1.

    Args:
        scores: (I, t) scores; of equal ones the earlier is better.
        valid: (I, t) bool, False where a smaller image is filled up.

    Returns:
        (I, t) whole numbers as float32; 0 or less where not `valid`.
    """
    return (valid.sum(-1, keepdim=True) - inverse(by_score(scores, valid))).float()


def carve(
    features: Tensor, order: Tensor, counts: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Take 1.5 times as many tokens as should stay, and merge the surplus into the better ones.

    Args:
        features: (I, t, D) states of the visual tokens.
        order: (I, t) the tokens from the best to the worst, those that are not `valid` last.
        counts: (I,) tokens to leave of each image, at most as many as it has.
        valid: (I, t) bool, False where a smaller image is filled up.

    Returns:
        The tokens that stay, (I, t) bool; and (I, t, D) states, in which tokens that others were
        merged into have the mean, or None if nothing is merged.
    """
    taken = torch.minimum(counts * 3 // 2, valid.sum(-1))[:, None]
    rank = inverse(order)
    better, rest = rank < taken // 2, (rank >= taken // 2) & (rank < taken)
    merged = (taken[:, 0] - counts).tolist()
    if not any(merged):
        return better | rest, None
    # The better half by rank, so that of equally similar ones the best is chosen.
    into = order[:, : int(taken.max()) // 2]
    inside = better.gather(1, into)
    tokens, there = pack(rest)
    similarity = cosine(take(features, tokens), take(features, into))
    best, partner = similarity.masked_fill(~inside[:, None], -torch.inf).max(-1)
    # An image that keeps one token has no better half, and nothing to merge.
    joins = top_k(best.masked_fill(~(there & inside[:, :1]), 0.0), merged, there)

    wide = widened(features)
    weights = (one_hot(partner, into.shape[1]) * joins[..., None]).to(wide.dtype)
    sums = take(wide, into) + weights.mT @ take(wide, tokens)
    means = (sums / (1 + weights.sum(1))[..., None]).to(features.dtype)
    joined = weights.any(1) & inside
    rows = torch.arange(len(into), device=into.device)[:, None]
    states = features.index_put((rows.expand_as(into)[joined], into[joined]), means[joined])
    gone = torch.zeros_like(valid).scatter(1, tokens, joins)
    return (better | rest) & ~gone, states
