"""VisPruner: patches that the CLS token attends to, and a diverse choice of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pore.errors import BudgetError
from pore.methods._checks import check_share
from pore.methods.scorer import BudgetPruner
from pore.tensors.gathering import cosine
from pore.tensors.selection import budget, by_score, check_finite, even_shares
from pore.tower.stages import TowerSelection, TowerStage, TowerView

_ROUND = 8
"""Patches removed in one round."""


@dataclass(frozen=True)
class VisPruner(BudgetPruner):
    """Keep important patches by CLS attention and diverse ones among the rest (arXiv 2412.01818).

    Of T patches to keep, int(T * important_ratio) are those with the largest CLS attention,
    averaged over heads, at the tower layer whose output the projector reads. From the others
    near-duplicates are removed, 8 in each round, by the cosine of their features before the
    projector, until T are left in all. `important_ratio=1` is FasterVLM. Kept patches stay in
    raster order. Every tile of an image is pruned by itself, with an even share of `keep`.

    A round splits what is left into two halves. The authors' code expects that they have the same
    size and at least as many patches as the round removes; otherwise it stops with an error or
    keeps a wrong number. Here the first half may be one longer, and a round removes at most as many
    patches as that half has, so every budget is met exactly.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
        important_ratio: Share of them that is chosen by attention.
        faithful: Keep what the authors' code keeps: where it stops with an error, a `BudgetError`
            is raised, and where it keeps a wrong number, so does this. In tiled images it can
            choose patches of padding, which the decoder never gets, so that fewer than `keep` reach
            it. In all other cases the result is the same.
    """

    important_ratio: float = 0.5
    faithful: bool = False

    name: ClassVar[str] = "VisPruner"
    paper: ClassVar[str] = "arXiv 2412.01818"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(important_ratio=self.important_ratio)

    def stages(self) -> Sequence[TowerStage]:
        """One stage, in the tower."""
        return [TowerStage(self._select)]

    def _select(self, view: TowerView) -> TowerSelection:
        if self.faithful:
            shown, counts = torch.ones_like(view.shown), _shares_with_padding(view, self.keep)
        else:
            shown, counts = view.shown, view.budgets(self.keep)
        attention = view.cls_attention[0].mean(1)
        check_finite(attention, view.features)
        order = by_score(attention, shown)
        alike: dict[tuple[int, int], list[int]] = {}
        for i, size in enumerate(zip(shown.sum(1).tolist(), counts, strict=True)):
            alike.setdefault(size, []).append(i)
        mask = torch.zeros_like(shown)
        for (room, count), images in alike.items():  # a single one, except for tiles with padding
            first = int(count * self.important_ratio)
            important, others = order[images, :first], order[images, first:room]
            diverse = dissimilar(view.features[images], others, count - first, self.faithful)
            kept = torch.cat([important, diverse], 1)
            mask[images] = mask[images].scatter(1, kept, torch.ones_like(kept, dtype=torch.bool))
        return view.select(mask, mask.sum(1).tolist())


def _shares_with_padding(view: TowerView, keep: int | float) -> list[int]:
    """Shares of `keep` for all I images or tiles, where patches of padding count too."""
    n = view.features.shape[1]
    return [share for t in view.tiles for share in even_shares(budget(keep, t * n), [n] * t)]


def dissimilar(features: Tensor, candidates: Tensor, count: int, faithful: bool = False) -> Tensor:
    """Remove near-duplicates among candidates until `count` are left.

    In every round the candidates are dealt alternately to two halves, and up to 8 of the first
    half, those with the largest cosine to any of the second, are removed. The next round deals what
    is left of the first half by descending cosine, then the second half in its order.

    Args:
        features: (I, N, C) features of all patches.
        candidates: (I, R) patches to choose from, in the order of the first deal.
        count: Patches to leave, at most R.
        faithful: Keep what the authors' indexing keeps, see `VisPruner`.

    Returns:
        (I, count) patches, in the order of the last deal; `faithful` can leave more or fewer.

    Raises:
        BudgetError: `faithful`, and the authors' code stops with an error.
    """
    if count == 0:
        return candidates[:, :0]
    similarity = cosine(features, features)
    images = torch.arange(len(features), device=features.device)[:, None, None]
    while (excess := candidates.shape[1] - count) > 0:
        one, other = candidates[:, 0::2], candidates[:, 1::2]
        closest = similarity[images, one[:, :, None], other[:, None]].amax(-1)
        order = one.gather(1, closest.argsort(dim=-1, descending=True, stable=True))
        drop = min(_ROUND, excess)
        if faithful:
            stay = _kept_by_the_authors(candidates.shape[1], drop)
        else:
            stay = max(one.shape[1] - drop, 0)
        candidates = torch.cat([order[:, one.shape[1] - stay :], other], 1)
    return candidates


def _kept_by_the_authors(count: int, drop: int) -> int:
    """How many of the first half stay if `drop` of `count` candidates should be removed.

    The authors index with image numbers expanded to the width count // 2 - drop (where -1 leaves it
    at 1) and the ranks after `drop`, which broadcast against each other.
    """
    expanded = count // 2 - drop
    ranks = max((count + 1) // 2 - drop, 0)
    width = 1 if expanded == -1 else expanded
    if width == 1:
        return ranks
    if expanded < -1 or (width != ranks and ranks != 1):
        raise BudgetError(
            f"The authors' code stops with an error if {drop} of {count} candidates are to be "
            "removed in a round (it needs an even number, and can remove at most half); choose "
            "another keep or important_ratio, or faithful=False."
        )
    return width
