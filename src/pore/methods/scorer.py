"""What methods of one budget share, and the methods that are no more than a score."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from pore.engine.corrections import Correction, correction_of
from pore.engine.limits import check_layer
from pore.engine.pruner import Pruner
from pore.engine.readers import Reader
from pore.engine.stages import Selection, Stage, View
from pore.families.base import Family
from pore.identity import at_hand
from pore.tensors.selection import budget, check_keep, top_k


@dataclass(frozen=True)
class BudgetPruner(Pruner):
    """A method of one stage that leaves `keep` tokens of every image.

    A subclass gives `stages`. Whatever else it has to check, it checks in a `__post_init__` that
    begins with `super().__post_init__()`.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
    """

    keep: int | float

    paper: ClassVar[str] = "unpublished"

    def __post_init__(self) -> None:
        check_keep(self.keep)


@dataclass(frozen=True)
class ScoredPruner(BudgetPruner):
    """A method of one score: before one layer, the tokens of the highest scores stay.

    A subclass gives `name` and `score`. The rest follows: the budget, the layer's range, ragged
    batches, what `pore methods` and `pore flops` say. If the score is attention, `reader` says
    whose. If it has a position bias in it, set `reweightable = True` and add a field
    `reweight: Reweight | None = None`: the scores are then divided by the bias, or corrected
    otherwise, and a bias that was measured elsewhere is refused. What is left to a method that
    chooses otherwise than by the highest scores is `choose`.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
        layer: K, the 0-based index of the first layer that sees fewer tokens; 0 prunes the
            embeddings, so that no layer sees the others.
        earliest: The earliest layer allowed; 1 for scores that come from the layer before.
    """

    layer: int = 2

    earliest: ClassVar[int] = 0

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """(I, t) scores of the visual tokens, the highest being kept.

        Args:
            view: What there is to see. Its tensors are of I images, each filled up to t tokens;
                entries that are not `view.layout.valid` hold anything, and so may their scores.

        Returns:
            The scores, of any real type; of equal ones the earlier token wins.
        """

    def reader(self) -> Reader | None:
        """What of the attention of layer - 1 becomes `view.attention`; None reads none."""
        return None

    def kept(self, visual: int) -> int:
        """How many tokens stay of an image that came with so many.

        Raises:
            BudgetError: The image has fewer than are to be kept.
        """
        return budget(self.keep, visual)

    def choose(self, view: View, scores: Tensor) -> Selection:
        """What stays, by scores (I, t) that are corrected already."""
        return Selection(top_k(scores, view.budget(self.kept), view.layout.valid))

    def stages(self) -> Sequence[Stage]:
        """One stage, before layer K."""
        return [Stage(self.layer, self._select, self.reader(), correction=self._correction)]

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse a layer that the decoder lacks, and a bias measured under other conditions."""
        check_layer(self.layer, family, model, self.earliest)
        if self._correction is not None:
            measures = getattr(self.reader(), "measures", None)
            self._correction.check(layer=self.layer, normalize=measures, **at_hand(model))

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image that enter every decoder layer."""
        return [visual] * self.layer + [self.kept(visual)] * (layers - self.layer)

    @property
    def _correction(self) -> Correction | None:
        """The correction, of methods that take one."""
        return correction_of(getattr(self, "reweight", None))

    def _select(self, view: View) -> Selection:
        return self.choose(view, view.corrected(self.score(view)))
