"""VTC-CLS: keep the patches that the CLS token attends to most over several tower layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pore.cost.shapes import ModelShape
from pore.errors import BudgetError
from pore.methods._checks import is_whole
from pore.methods.fastervlm import keep_highest
from pore.methods.scorer import BudgetPruner
from pore.tower.stages import TowerSelection, TowerStage, TowerView


@dataclass(frozen=True)
class VTCCLS(BudgetPruner):
    """Keep the patches with the largest CLS attention, summed over layers (arXiv 2412.05819).

    The head mean of every layer from `start_layer` up to the one whose output the projector reads
    is added up. The authors give no default range; with that last layer alone the ranking is
    FasterVLM's. In a tower without a CLS token (SigLIP) the attention that patches receive,
    averaged over all queries, takes its place, as in FasterVLM.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
        start_layer: 0-based index of the first tower layer summed. Below 0 it counts from the
            tower's end, as the authors' slices do: with -3 the last layer but two is the first.
    """

    start_layer: int

    name: ClassVar[str] = "VTC-CLS"
    paper: ClassVar[str] = "arXiv 2412.05819"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.start_layer):
            raise BudgetError(f"start_layer={self.start_layer!r} is no index of a tower layer.")

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> VTCCLS:
        """The upper half of the tower; the authors leave the range open."""
        return cls(keep=keep, start_layer=(shape.tower_layers - 1) // 2)

    def stages(self) -> Sequence[TowerStage]:
        """One stage, in the tower."""
        return [TowerStage(self._select, layers=self._layers)]

    def _layers(self, read: int, count: int) -> range:
        first = self.start_layer + (count if self.start_layer < 0 else 0)
        if not 0 <= first <= read:
            raise BudgetError(
                f"start_layer={self.start_layer} is none of the layers up to {read}, whose output "
                f"the projector reads, of a tower of {count}; choose 0 to {read}, or, from the "
                f"end, {-count} to {read - count}."
            )
        return range(first, read + 1)

    def _select(self, view: TowerView) -> TowerSelection:
        return keep_highest(view, view.cls_attention.mean(2).sum(0), self.keep)
