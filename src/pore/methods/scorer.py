"""What methods with one budget share, and what methods share that are just a score."""

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

    A subclass defines `stages`. If it has more to check, it does so in a `__post_init__` that
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
    """A method with one score: before one layer, the tokens with the highest scores stay.

    A subclass defines `name` and `score`. The rest follows: the budget, the layer's range, ragged
    batches, what `pore methods` and `pore flops` say. If the score is attention, `reader` says
    whose. If it contains a position bias, set `reweightable = True` and add a field
    `reweight: Reweight | None = None`: the scores are then divided by the bias, or corrected in
    another way, and a bias that was measured elsewhere is refused. A method that does not simply
    keep the highest scores overrides `choose`.

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
        """(I, t) scores of the visual tokens; the highest are kept.

        Args:
            view: What the method can see. Its tensors have I images, each filled up to t tokens;
                entries that are not `view.layout.valid` can hold any value, and so can their
                scores.

        Returns:
            The scores, of any real type; of equal ones the earlier token wins.
        """

    def reader(self) -> Reader | None:
        """What is read from layer - 1 and becomes `view.attention`; None reads nothing."""
        return None

    def kept(self, visual: int) -> int:
        """How many tokens stay of an image that came with `visual` tokens.

        Raises:
            BudgetError: The image has fewer than should be kept.
        """
        return budget(self.keep, visual)

    def choose(self, view: View, scores: Tensor) -> Selection:
        """What stays, given scores (I, t) that are already corrected."""
        return Selection(top_k(scores, view.budget(self.kept), view.layout.valid))

    def stages(self) -> Sequence[Stage]:
        """One stage, before layer K."""
        return [Stage(self.layer, self._select, self.reader(), correction=self._correction)]

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse a layer that the decoder does not have, and a bias measured elsewhere."""
        check_layer(self.layer, family, model, self.earliest)
        if self._correction is not None:
            measures = getattr(self.reader(), "measures", None)
            self._correction.check(layer=self.layer, normalize=measures, **at_hand(model))

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image that enter every decoder layer."""
        return [visual] * self.layer + [self.kept(visual)] * (layers - self.layer)

    @property
    def _correction(self) -> Correction | None:
        """The correction, if the method takes one and has it."""
        return correction_of(getattr(self, "reweight", None))

    def _select(self, view: View) -> Selection:
        return self.choose(view, view.corrected(self.score(view)))
