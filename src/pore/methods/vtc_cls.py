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
    is summed. The authors give no default range; with the last of these layers alone the ranking is
    FasterVLM's. In a tower without a CLS token (SigLIP) the attention that patches receive,
    averaged over all queries, is used instead, as in FasterVLM.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
        start_layer: 0-based index of the first tower layer summed. A negative number counts from
            the tower's end, as in the authors' slices: -3 begins at the last layer but two.
    """

    start_layer: int

    name: ClassVar[str] = "VTC-CLS"
    paper: ClassVar[str] = "arXiv 2412.05819"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.start_layer):
            raise BudgetError(f"start_layer={self.start_layer!r} is not an index of a tower layer.")

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
                f"start_layer={self.start_layer} is out of range: the tower has {count} layers and "
                f"the projector reads the output of layer {read}; choose 0 to {read}, or, from the "
                f"end, {-count} to {read - count}."
            )
        return range(first, read + 1)

    def _select(self, view: TowerView) -> TowerSelection:
        return keep_highest(view, view.cls_attention.mean(2).sum(0), self.keep)
