"""What the two SparseVLM methods share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pore.engine.readers import LayerAttention
from pore.engine.stages import Selection
from pore.tensors.clustering import density_peaks
from pore.tensors.gathering import marked_first, take, widened
from pore.tensors.merging import group_means
from pore.tensors.selection import budget, by_score

_RECYCLED = 0.3  # this share of the dropped tokens, those with the highest scores, is merged


_TO_ONE = 10  # about this many are merged into one


@dataclass(frozen=True)
class Raters:
    """The words that rate each of I images.

    Attributes:
        index: (I, R) their positions in the prompt as it enters the decoder; filled up with the
            last token if an image has fewer.
        valid: (I, R) bool, False at filling.
        length: L, the number of positions in that prompt.
        prior: (L,) what RoPE alone gives at every distance, to divide attention by, or None.
    """

    index: Tensor
    valid: Tensor
    length: int
    prior: Tensor | None


@dataclass(frozen=True)
class Rated:
    """How much attention the raters of I images pay to the visual tokens.

    Attributes:
        attention: (I, H, t) attention of every head, averaged over the raters; 0 where there is no
            token.
        corrected: The same, divided by the prior before averaging, or None.
        matrix: (I, R, t) attention of every rater, averaged over heads, or None.
    """

    attention: Tensor
    corrected: Tensor | None = None
    matrix: Tensor | None = None


@dataclass(frozen=True)
class RaterAttention:
    """Reads the attention of the raters to the visual tokens of their image.

    Attributes:
        prior: Whether to divide by the prior of RoPE as well.
        matrix: Whether to return the attention of every rater as well.
    """

    prior: bool = False
    matrix: bool = False

    measures: ClassVar[str] = "raters"

    def __call__(self, attention: LayerAttention) -> Rated:
        """The attention of the raters that the stage's `prepare` found."""
        layout, raters = attention.layout, attention.memory
        device = attention.query.device
        index, valid = raters.index.to(device), raters.valid.to(device)
        # Words are never dropped, so each is still in the sequence.
        origin = attention.origin
        slots = torch.arange(origin.shape[1], device=device).expand_as(origin)
        here = slots.new_zeros(origin.shape[0], raters.length).scatter_(1, origin, slots)
        weights = attention.weights(here[layout.rows[:, None], index])
        inside = valid[:, None, :, None] & layout.valid[:, None, None]
        weights = weights.masked_fill(~inside, 0.0)
        raters_of = valid.sum(-1)[:, None, None]
        corrected = None
        if self.prior:
            places = origin[layout.rows[:, None], layout.columns]
            distance = (index[:, :, None] - places[:, None]).clamp(min=0)
            fair = weights / raters.prior.to(weights)[distance][:, None]
            corrected = fair.masked_fill(~inside, 0.0).sum(2) / raters_of
        matrix = weights.mean(1) if self.matrix else None
        return Rated(weights.sum(2) / raters_of, corrected, matrix)


def _curve(rated: Rated) -> Tensor:
    return rated.attention.mean(1)


def rate(visual: Tensor, valid: Tensor, text: Tensor, words: Tensor) -> Tensor:
    """Which words are raters: those more similar to the image than the average word.

    Every visual token spreads a softmax over the words by its dot products with them; a word's
    weight is the mean over the visual tokens.

    Args:
        visual: (I, t, D) embeddings of the visual tokens.
        valid: (I, t) bool, False where a smaller image is filled up.
        text: (I, T, D) embeddings of the words.
        words: (I, T) bool, False where a shorter text is filled up.

    Returns:
        (I, T) bool.
    """
    logits = torch.matmul(widened(visual), widened(text).mT)
    weights = logits.masked_fill(~words[:, None], -torch.inf).softmax(-1)
    weights = weights.masked_fill(~valid[..., None], 0.0).sum(1) / valid.sum(-1, keepdim=True)
    mean = weights.sum(-1, keepdim=True) / words.sum(-1, keepdim=True)
    return (weights > mean) & words


def rotary_prior(rotary: Any, states: Tensor) -> Tensor:
    """The scaled dot product of an all-ones query and key after RoPE, by their distance.

    Args:
        rotary: Makes rotary tables for states (B, m, D) at positions (B, m).
        states: (B, L, D).

    Returns:
        (L,) the prior at distances 0 to L - 1, at least float32; √d at 0 for heads of size d.
    """
    distance = torch.arange(states.shape[1], device=states.device)[None]
    tables = rotary(widened(states[:1, :, :1]), distance)
    alone = isinstance(tables, Tensor)  # a complex number for every two dimensions (Llama 4)
    cosines: Tensor = tables.real.repeat_interleave(2, -1) if alone else tables[0]
    width = cosines.shape[-1]
    return cosines[0].sum(-1) / math.sqrt(width)


def strongest_heads(scores: Tensor, count: int) -> Tensor:
    """The heads that pay most attention to the visual tokens.

    Args:
        scores: (I, H, t) scores of every head; 0 where there is no token.
        count: Heads to choose.

    Returns:
        (I, min(count, H)) heads, the strongest first.
    """
    return scores.sum(-1).argsort(dim=-1, descending=True, stable=True)[:, :count]


def matrix_ranks(matrix: Tensor, counts: Sequence[int]) -> list[int]:
    """The rank of every image's matrix.

    Args:
        matrix: (I, R, t) of zeros where an image has fewer rows or columns.
        counts: Number of columns of each.

    Returns:
        I ranks: singular values above the largest times the columns times the type's precision.
    """
    limit = torch.tensor(counts, device=matrix.device) * torch.finfo(matrix.dtype).eps
    found: list[int] = torch.linalg.matrix_rank(matrix.nan_to_num(), rtol=limit).tolist()
    return found


def clusters(dropped: int) -> int:
    """How many merged tokens the dropped ones become."""
    return _pool(dropped) // _TO_ONE + 1 if dropped else 0


def _pool(dropped: int) -> int:
    """How many of the dropped tokens are merged."""
    return int(dropped * _RECYCLED) + 1 if dropped else 0


def split(total: int, available: int) -> tuple[int, int]:
    """How many tokens to keep so that, with those merged from the others, there are `total`.

    Args:
        total: Tokens to be left, at least 1.
        available: Tokens there are.

    Returns:
        Tokens to keep, at least 1 and as many as possible; and the number of clusters to merge
        others into: `clusters` of them, or fewer if even one kept token would leave too many.

    Raises:
        BudgetError: There are fewer than `total`.
    """
    if budget(total, available) == available:
        return available, 0
    for kept in range(total - 1, 0, -1):
        if kept + clusters(available - kept) == total:
            return kept, total - kept
    return 1, total - 1


def recycle(
    features: Tensor,
    raster: Tensor,
    scores: Tensor,
    keep: Tensor,
    valid: Tensor,
    merged: Sequence[int],
    after: bool = True,
) -> Selection:
    """Merge the best of the dropped tokens.

    Args:
        features: (I, t, D) states of the visual tokens.
        raster: (I, t) the original token that each of them stands for.
        scores: (I, t) their scores.
        keep: (I, t) bool, the tokens kept.
        valid: (I, t) bool, False where a smaller image is filled up.
        merged: Number of tokens to make from the dropped ones of each image; 0 makes none.
        after: Whether the merged tokens come after the kept ones, the most central first, and
            stand for no patch. Otherwise each takes the place of the most central token merged into
            it, for models in which tokens keep their positions.

    Returns:
        The kept tokens and the merged ones.
    """
    dropped = valid & ~keep
    pools = [_pool(count) for count in dropped.sum(-1).tolist()]
    order = by_score(scores, dropped)[:, : max(pools)]
    slots = torch.arange(keep.shape[1], device=keep.device)
    inside = slots[: order.shape[1]] < torch.tensor(pools, device=keep.device)[:, None]
    x = take(features, order)
    cluster, centres = density_peaks(x, merged, inside)
    new, _ = group_means(x, cluster, inside, max(merged))

    kept, added = keep.sum(-1, keepdim=True), torch.tensor(merged, device=keep.device)[:, None]
    if not after:
        real = slots[: new.shape[1]] < added
        rows = torch.arange(len(keep), device=keep.device)[:, None].expand_as(real)[real]
        places = order.gather(1, centres)[real]
        states = features.to(new.dtype, copy=True)
        states[rows, places] = new[real]
        stays = keep.index_put((rows, places), torch.ones_like(places, dtype=torch.bool))
        return Selection(stays, states)
    old = marked_first(keep)
    stays = slots < kept
    number = (slots - kept).clamp(0, new.shape[1] - 1)
    states = torch.where(stays[..., None], take(features, old).to(new.dtype), take(new, number))
    return Selection(slots < kept + added, states, raster.gather(1, old).masked_fill(~stays, -1))
