"""SCOPE: patches that cover most of the image, weighted by the attention of the CLS token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pore.errors import BudgetError, ScoreError
from pore.methods._checks import check_choice
from pore.methods.scorer import BudgetPruner
from pore.tensors.gathering import cosine
from pore.tensors.selection import budget, check_finite
from pore.tower.stages import TowerSelection, TowerStage, TowerView

Combine = Literal["multiply", "add"]


@dataclass(frozen=True)
class SCOPE(BudgetPruner):
    """Keep patches that are attended to and cover what others do not (arXiv 2510.24214).

    Patches are chosen one after the other, in the vision tower. How well a patch of the image is
    covered is the largest cosine of its features, before the projector, to those of a chosen patch,
    but at least 0. A patch's gain is how much better all patches would be covered if it were
    chosen. Its score is the gain times s^alpha, where s is the attention of the CLS token to it,
    summed over heads, at the tower layer whose output the projector reads. The patch with the
    highest score is chosen, and gains are computed again. Chosen patches stay in raster order; the
    CLS token does not stay.

    The choice of k among N patches costs k rounds of N x N.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float). In a family that cuts
            images into tiles the budget is divided evenly among the tiles.
        alpha: Power of the attention; 0 ignores it.
        combine: Whether gain and attention are multiplied ("multiply") or added ("add").
        faithful: Read `keep` as the authors' code does: as the total of all images and tiles that
            go through the tower together, each of which gets the same number, rounded down. In
            tiled images it can then choose patches of padding, which the decoder never gets, and
            newline tokens are dropped.
    """

    alpha: float = 1.0
    combine: Combine = "multiply"
    faithful: bool = False

    name: ClassVar[str] = "SCOPE"
    paper: ClassVar[str] = "arXiv 2510.24214"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(Combine, combine=self.combine)
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ScoreError(f"alpha must be a number of at least 0, not {self.alpha!r}.")

    def stages(self) -> Sequence[TowerStage]:
        """One stage, in the tower."""
        return [TowerStage(self._select)]

    def _select(self, view: TowerView) -> TowerSelection:
        shown = torch.ones_like(view.shown) if self.faithful else view.shown
        counts = self._shares(*shown.shape) if self.faithful else view.budgets(self.keep)
        attention = view.cls_attention[0].sum(1)
        check_finite(attention)
        similarity = cosine(view.features, view.features)
        _, rank = covering(similarity, attention**self.alpha, max(counts), shown, self.combine)
        ends = torch.tensor(counts, device=rank.device)[:, None]
        return view.select(rank < ends, counts, structure=not self.faithful)

    def _shares(self, pictures: int, patches: int) -> list[int]:
        """What every picture of a call gets of the authors' total."""
        share = budget(self.keep, pictures * patches) // pictures
        if share == 0:
            raise BudgetError(
                f"keep={self.keep} for {pictures} images or tiles together is less than one token "
                "for each; ask for more, or leave faithful=True out."
            )
        return [share] * pictures


def covering(
    similarity: Tensor, weights: Tensor, count: int, valid: Tensor, combine: Combine = "multiply"
) -> tuple[Tensor, Tensor]:
    """Choose patches that cover all of them, one after the other.

    Args:
        similarity: (I, N, N) how well one patch covers another; at most 0 covers nothing.
        weights: (I, N) what every patch's gain is multiplied by, or what is added to it.
        count: Patches to choose of every image.
        valid: (I, N) bool, the patches that there are. Once all of an image are chosen, what
            follows is arbitrary.
        combine: "multiply" or "add".

    Returns:
        order (I, count), the patches in the order they are chosen, of equal scores the earlier one
        first; and rank (I, N), the place of every patch in that order, `count` where it is not
        chosen.
    """
    images = torch.arange(len(similarity), device=similarity.device)
    # Rows are covered by columns. Below 0 nothing is: that is where every patch starts.
    covers = similarity.clamp(min=0).masked_fill(~valid[:, :, None], 0.0)
    covered = torch.zeros_like(covers[:, :, 0])
    left, order = valid.clone(), []
    rank = torch.full(valid.shape, count, device=valid.device)
    for step in range(count):
        gain = (covers - covered[:, :, None]).clamp(min=0).sum(1)
        scores = gain * weights if combine == "multiply" else gain + weights
        pick = scores.masked_fill(~left, -torch.inf).argmax(1)
        order.append(pick)
        rank[images, pick] = torch.where(left[images, pick], step, rank[images, pick])
        left[images, pick] = False
        covered = torch.maximum(covered, covers[images, :, pick])
    return torch.stack(order, 1), rank
