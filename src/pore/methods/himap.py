"""HiMAP: first by what the text looks at, then by what the image itself looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from pore.cost.shapes import ModelShape
from pore.engine.corrections import Correction, Reweight
from pore.engine.readers import LayerAttention, received
from pore.engine.stages import Stage, View
from pore.errors import BudgetError
from pore.methods.st3 import TextMean
from pore.methods.staged import StagedPruner, correction_of_each
from pore.tensors.selection import budget, check_keep


@dataclass(frozen=True)
class HiMAP(StagedPruner):
    """Prune early by the text's attention and later by the image's own (arXiv 2503.13108).

    Before the first of `layers` the visual tokens are ranked by the attention that all text tokens
    after the image pay to them in the layer before, averaged over heads; before the second, those
    left are ranked by the attention that they pay to each other. Tokens keep their positions.

    There are no golden files: the rule was read from the authors' code (ustc-hyin/HiMAP @ 6c279e7),
    and the tests compute it directly. That code takes one prompt with one image at fixed places and
    runs without a cache, so it prunes anew for every token of the answer, and earlier answer tokens
    count as text; `generate(use_cache=False)` does that here too.

    With `reweight=P` the text's attention is divided by P, as PoRe's authors do (version 2 of arXiv
    2508.17807); the image's own attention has no such bias and is not divided.

    Attributes:
        keep: Tokens per image after the second pruning (int), or the fraction (float).
        layers: The 0-based index of the first pruned layer of both stages.
        first: Tokens that the first pruning leaves (int), or the fraction; never fewer than `keep`.
            The authors leave 288 and then 72 of 576; PoRe's scripts 115 and then 90.
        reweight: The position bias P of the first stage, or another correction, or None.
    """

    keep: int | float
    layers: tuple[int, ...] = (2, 8)
    first: int | float = 0.5
    reweight: Reweight | tuple[Reweight, ...] | None = None

    name: ClassVar[str] = "HiMAP"
    paper: ClassVar[str] = "arXiv 2503.13108"
    reweightable: ClassVar[bool] = True
    harmed: ClassVar[str | None] = "every form of it did, and why is not known"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        check_keep(self.first)
        if len(self.layers) != 2:
            raise BudgetError(f"layers={self.layers!r}: there are two stages; give two layers.")

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> HiMAP:
        """The authors' layers in a decoder of 32, scaled to another depth."""
        depth = shape.decoder.layers
        first = max(1, round(2 * depth / 32))
        return cls(keep, (first, max(first + 1, round(8 * depth / 32))))

    @property
    def corrections(self) -> tuple[Correction | None, ...]:
        """The correction of the first stage; the second has none."""
        return (*correction_of_each(self.reweight, 1), None)

    def reader(self) -> TextMean:
        """The attention of the text after the image, for the first stage."""
        return TextMean()

    def stages(self) -> Sequence[Stage]:
        """One stage by the text's attention, one by the image's."""
        first, second = super().stages()
        return [first, replace(second, attention=_within)]

    def remaining(self, visual: int) -> Sequence[int]:
        """Tokens left after both prunings, for an image that came with `visual` tokens."""
        last = budget(self.keep, visual)
        first = self.first if isinstance(self.first, int) else round(self.first * visual)
        return [min(max(last, first), visual), last]

    def score(self, stage: int, view: View) -> Tensor:
        """The attention that every token gets; the text's is divided by P if there is one."""
        return view.corrected(view.attention)


def _within(attention: LayerAttention) -> Tensor:
    """(I, t) the attention that every visual token gets from those of its image, averaged over
    tokens and heads."""
    layout = attention.layout
    return received(attention, layout.columns, layout.valid, "mean", corrected=False)
