"""HoloV: a budget shared out among the strips of an image, so that no part of it is left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from pore.engine.stages import Limit, Selection, Stage, View
from pore.errors import ScoreError
from pore.families.base import Family
from pore.methods._checks import check_whole
from pore.methods._tower import tower_attention
from pore.methods.scorer import BudgetPruner
from pore.tensors.gathering import pack, take, widened
from pore.tensors.selection import by_score, check_finite, top_k

_TINY = 1e-6  # the authors' guard against divisions by 0
_SCALE = 1000.0
_CROPS = 1024 / 576
"""The number of crops times the fraction kept: 16 crops if 64 of 576 tokens stay."""


@dataclass(frozen=True)
class HoloV(BudgetPruner):
    """Keep tokens with the most attention in every part of the image (arXiv 2510.02912).

    The tokens of an image, in raster order, are cut into `crops` runs of equal length, strips of
    the picture. A token's score is A + alpha v. A is 1000 times the attention of the CLS token to
    it, averaged over heads, at the tower layer whose output the projector reads; v is the variance
    of its cosines to the crop's other tokens after the projector, scaled to the mean of A in the
    crop. A crop gets tokens in proportion to its mean score, rounded down; the crops with the
    largest scores get one more each until the budget is used. In every crop the tokens with the
    most attention stay.

    Because v is scaled to the mean of A, it multiplies the score of every crop by nearly the same
    number, and decides almost nothing. It is computed as in the authors' code.

    It acts on the embeddings, and positions are numbered anew. Tiles of an image are one sequence,
    in the order of the prompt, with one budget.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
        crops: How many crops; at most one for each token. None takes the authors' rule for
            Qwen2.5-VL, (1024 / 576) / keep crops, with `keep` as a fraction: 16 if 64 of 576 stay,
            as in their LLaVA.
        alpha: Weight of v.
        faithful: Order the tokens of a crop by falling attention, unless all of them stay. If a
            crop gets more tokens than it has, add vectors of zeros, which the decoder attends to,
            at the end of the image. Do not scale up the attention of a crop of one token, so that
            beside larger ones it gets nothing. Drop newline tokens. By default kept tokens stay in
            raster order, and the part of the budget that a crop cannot use goes to the tokens with
            the most attention among all others.
    """

    crops: int | None = None
    alpha: float = 0.09
    faithful: bool = False

    name: ClassVar[str] = "HoloV"
    paper: ClassVar[str] = "arXiv 2510.02912"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crops is not None:
            check_whole(1, crops=self.crops)
        if not math.isfinite(self.alpha):
            raise ScoreError(f"alpha={self.alpha!r} is not a finite number.")

    def stages(self) -> Sequence[Stage]:
        """One stage, on the embeddings, which reads attention of the tower."""
        return [Stage(0, self._select, tower=True, tower_attention="cls", merges=self.faithful)]

    def limits(self, family: Family) -> list[Limit]:
        """Tokens can change places only if positions are counted."""
        found = super().limits(family)
        if self.faithful and family.mrope:
            found.append(
                Limit(
                    "faithful=True orders tokens by attention and adds some, but a visual token's "
                    "position is its place in the image; use faithful=False."
                )
            )
        return found

    def _select(self, view: View) -> Selection:
        valid, counts = view.layout.valid, view.budget(self.keep)
        attention = tower_attention(view, "cls")
        check_finite(attention[valid])
        index, there = crops_of(valid.sum(1).tolist(), self._crops(valid.sum(1).tolist(), counts))
        index, there = index.to(valid.device), there.to(valid.device)
        shares = allocated(
            crop_scores(view.features, attention, index, there, self.alpha, not self.faithful),
            there.any(-1),
            torch.tensor(counts, device=valid.device),
        )
        if self.faithful:
            order = crop_order(attention, index, there, shares, max(counts))
            return self._as_the_authors(view, order, counts)
        mask = kept_in_crops(attention, index, there, shares)
        left = torch.tensor(counts, device=valid.device) - mask.sum(1)
        return Selection(mask | top_k(attention, left, valid & ~mask))

    def _crops(self, tokens: Sequence[int], counts: Sequence[int]) -> list[int]:
        """How many crops every image is cut into."""
        if self.crops is not None:
            return [self.crops] * len(tokens)
        return [max(1, int(_CROPS * n / k)) for n, k in zip(tokens, counts, strict=True)]

    def _as_the_authors(self, view: View, order: Tensor, counts: Sequence[int]) -> Selection:
        """The tokens in an order (I, k) of them; -1 is a vector of zeros."""
        slots = view.layout.valid.shape[1]
        ends = torch.tensor(counts, device=order.device)[:, None]
        order = pad(order, (0, slots - order.shape[1]), value=-1)
        picked = order.clamp(min=0)
        zero = order < 0
        return Selection(
            keep=torch.arange(slots, device=order.device) < ends,
            features=take(view.features, picked).masked_fill(zero[..., None], 0.0),
            raster=view.layout.raster.gather(1, picked).masked_fill(zero, -1),
            structure=[False] * len(view.layout.images),
        )


def crops_of(tokens: Sequence[int], crops: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cut images into crops of equal length; the first ones are one longer where that is not even.

    Args:
        tokens: How many tokens every image has.
        crops: Into how many crops it is cut, of which there is at most one for each token.

    Returns:
        index (I, P, z), the tokens of every crop; and bool (I, P, z), False at filling.
    """
    sizes = []
    for n, count in zip(tokens, crops, strict=True):
        count = min(count, n)
        sizes.append([n // count + (i < n % count) for i in range(count)])
    width = max(map(len, sizes))
    lengths = torch.tensor([row + [0] * (width - len(row)) for row in sizes])
    first = lengths.cumsum(1) - lengths
    steps = torch.arange(int(lengths.max()))
    there = steps < lengths[..., None]
    return (first[..., None] + steps).masked_fill(~there, 0), there


def crop_scores(
    features: Tensor,
    attention: Tensor,
    index: Tensor,
    there: Tensor,
    alpha: float,
    scale_all: bool = True,
) -> Tensor:
    """The mean score of every crop.

    Args:
        features: (I, t, D) projected tokens.
        attention: (I, t) attention to them.
        index: (I, P, z) the tokens of every crop.
        there: (I, P, z) bool, False at filling.
        alpha: Weight of the variance.
        scale_all: Whether the attention of a crop of one token is scaled up like that of others.

    Returns:
        (I, P), at least float32.
    """
    images, count = torch.arange(len(index), device=index.device)[:, None, None], there.sum(-1)
    tokens = widened(features)[images, index]
    unit = tokens / (tokens.norm(dim=-1, keepdim=True) + _TINY)
    itself = torch.eye(index.shape[2], dtype=torch.bool, device=index.device)
    both = there[..., :, None] & there[..., None, :]
    similarity = (unit @ unit.mT).masked_fill(~both | itself, 0.0)
    others = (count - 1).clamp(min=1)[..., None]
    mean = similarity.sum(-1) / others
    # Their variance runs over the token itself too, with a similarity of 0.
    spread = (similarity - mean[..., None]).square().masked_fill(~both, 0.0).sum(-1) / others
    weights = (_SCALE * attention[images, index]).masked_fill(~there, 0.0)
    filled = count.clamp(min=1)[..., None]
    scaled = spread * (weights.abs().sum(-1, keepdim=True) / filled)
    scaled = scaled / (spread.abs().sum(-1, keepdim=True) / filled + _TINY)
    scores = (weights + alpha * scaled).sum(-1) / filled[..., 0]
    return scores if scale_all else torch.where(count == 1, scores / _SCALE, scores)


def allocated(scores: Tensor, crops: Tensor, counts: Tensor) -> Tensor:
    """How many tokens every crop gets, whether it has them or not.

    Args:
        scores: (I, P) scores of the crops.
        crops: (I, P) bool, False where an image has fewer crops.
        counts: (I,) tokens of every image.

    Returns:
        (I, P): the share of the score, rounded down, and one more for those with the largest
        scores.
    """
    scores = scores.masked_fill(~crops, 0.0)
    share = scores / (scores.sum(-1, keepdim=True) + _TINY)
    whole = (share * counts[:, None]).floor().long()
    rest = torch.minimum(counts - whole.sum(-1), crops.sum(-1))
    return whole + top_k(share, rest, crops)


def kept_in_crops(attention: Tensor, index: Tensor, there: Tensor, shares: Tensor) -> Tensor:
    """The tokens with the most attention in every crop, as many as it gets, or all that it has.

    Args:
        attention: (I, t) attention.
        index: (I, P, z) the tokens of every crop.
        there: (I, P, z) bool, False at filling.
        shares: (I, P) how many each gets.

    Returns:
        (I, t) bool.
    """
    weights = attention.gather(1, index.flatten(1)).view(index.shape).flatten(0, 1)
    room = torch.minimum(shares, there.sum(-1))
    chosen = top_k(weights, room.flatten(), there.flatten(0, 1)).view(index.shape)
    mask = torch.zeros_like(attention, dtype=torch.long)
    return mask.scatter_add(1, index.flatten(1), chosen.flatten(1).long()) > 0


def crop_order(
    attention: Tensor, index: Tensor, there: Tensor, shares: Tensor, width: int
) -> Tensor:
    """The tokens in the order of the authors' code.

    Args:
        attention: (I, t) attention.
        index: (I, P, z) the tokens of every crop.
        there: (I, P, z) bool, False at filling.
        shares: (I, P) how many each gets.
        width: Entries of an image.

    Returns:
        (I, width) tokens, crop by crop; in a crop by falling attention, or in raster order if all
        of it stays. -1 where the crops have no more.
    """
    weights = attention.gather(1, index.flatten(1)).view(index.shape)
    steps = torch.arange(index.shape[2], device=index.device)
    whole = (shares >= there.sum(-1))[..., None]
    keys = torch.where(whole, -steps.to(weights), weights)
    order = by_score(keys.flatten(0, 1), there.flatten(0, 1)).view(index.shape)
    ordered = index.gather(2, order).flatten(1)
    room = torch.minimum(shares, there.sum(-1))[..., None]
    places, valid = pack((steps < room).flatten(1))
    found = ordered.gather(1, places).masked_fill(~valid, -1)[:, :width]
    return pad(found, (0, width - found.shape[1]), value=-1)
