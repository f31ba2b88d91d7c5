"""FasterVLM: keep the patches that the CLS token attends to most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pore.methods.scorer import BudgetPruner
from pore.tensors.selection import top_k
from pore.tower.stages import TowerSelection, TowerStage, TowerView


@dataclass(frozen=True)
class FasterVLM(BudgetPruner):
    """Keep the patches with the largest CLS attention, averaged over heads (arXiv 2412.01818v1).

    The attention is that of the tower layer whose output the projector reads. Kept patches stay in
    raster order. For a tower without a CLS token (SigLIP) the authors have no rule; there, the
    attention that patches receive, averaged over all queries, is used.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
    """

    name: ClassVar[str] = "FasterVLM"
    paper: ClassVar[str] = "arXiv 2412.01818v1"

    def stages(self) -> Sequence[TowerStage]:
        """One stage, in the tower."""
        return [TowerStage(self._select)]

    def _select(self, view: TowerView) -> TowerSelection:
        return keep_highest(view, view.cls_attention[0].mean(1), self.keep)


def keep_highest(view: TowerView, scores: Tensor, keep: int | float) -> TowerSelection:
    """Keep the patches with the highest scores, in raster order.

    Args:
        view: The tower's patches.
        scores: (I, N) scores.
        keep: Tokens kept per image, divided evenly among its tiles, or the fraction kept.

    Returns:
        The kept patches.
    """
    counts = view.budgets(keep)
    return view.select(top_k(scores, counts, view.shown), counts)
