"""PyramidDrop: several pruning points inside the decoder, each ranked by the layer it prunes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from pore.bias.where import Positions
from pore.cost.shapes import ModelShape
from pore.engine.corrections import Reweight
from pore.engine.readers import LastToken
from pore.engine.stages import Stage, View
from pore.errors import BudgetError
from pore.methods._checks import check_choice
from pore.methods.staged import BY_A_BLIND_LAYER, StagedPruner
from pore.tensors.selection import budget, check_keep


@dataclass(frozen=True)
class PyramidDrop(StagedPruner):
    """Drop visual tokens in stages, fewer and fewer with depth (arXiv 2410.17247).

    Before each of `layers`, the visual tokens that are left are ranked by the attention of the last
    text token, averaged over heads, and the lowest are dropped. The attention is that of the layer
    itself: its queries and keys are computed once in advance, on all tokens that enter it. Kept
    tokens are numbered anew, so every layer sees positions without gaps, and in every layer a
    decoded token has the position after the last that this layer has cached.

    With `reweight=P` the ranking is by A / P. `index="original"` reads P at the token's place in
    the image, where P was measured; "dense" reads it at the token's distance to the text after
    positions were numbered anew.

    Attributes:
        keep: Tokens per image after the last stage (int), or the fraction of the original number
            (float); the stages before go down to it in equal ratios, so that 0.125 in three
            stages is the authors' 0.5, 0.25, 0.125. Or a tuple: what is left of the original number
            after every stage. Fractions are truncated, as by the authors: 0.125 of 37 is 4.
        layers: The first layer of every stage, the authors' `layer_list`: 8 means that eight layers
            still see the tokens that the stage drops.
        reweight: The position bias P or another correction, or one for every stage, or None.
        index: Where P is read: "original" or "dense".
    """

    keep: int | float | tuple[int | float, ...]
    layers: tuple[int, ...] = (8, 16, 24)
    reweight: Reweight | tuple[Reweight, ...] | None = None
    index: Positions = "original"

    name: ClassVar[str] = "PyramidDrop"
    paper: ClassVar[str] = "arXiv 2410.17247"
    reweightable: ClassVar[bool] = True
    harmed: ClassVar[str | None] = BY_A_BLIND_LAYER

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pyramid(self.keep, len(self.layers))
        check_choice(Positions, index=self.index)

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> PyramidDrop:
        """Stages at a quarter, half and three quarters of the decoder."""
        depth = shape.decoder.layers
        return cls(keep, tuple(sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)})))

    def reader(self) -> LastToken:
        """The last text token's attention."""
        return LastToken()

    def stages(self) -> Sequence[Stage]:
        """One stage before each of `layers`, ranked by that layer's own attention."""
        return [
            replace(stage, ahead=True, positions="dense", bias_at=self.index)
            for stage in super().stages()
        ]

    def remaining(self, visual: int) -> Sequence[int]:
        """Tokens left after every stage, for an image that came with `visual` tokens."""
        return pyramid(self.keep, len(self.layers), visual)

    def must_meet(self, stage: int) -> bool:
        """Numbers that are given for every stage must all be met."""
        return isinstance(self.keep, tuple) or super().must_meet(stage)

    def score(self, stage: int, view: View) -> Tensor:
        """The attention A of the last text token, divided by P if there is one."""
        return view.corrected(view.attention)


def check_pyramid(keep: int | float | tuple[int | float, ...], stages: int) -> None:
    """Refuse a `keep` that makes no sense.

    Args:
        keep: What is left after the last stage, or after each of them.
        stages: How many stages there are.

    Raises:
        BudgetError: A number is neither a number of tokens nor a fraction, there is not one for
            every stage, or a later one is larger.
    """
    if not isinstance(keep, tuple):
        keep = (keep,) * stages
    for one in keep:
        check_keep(one)
    if len(keep) != stages:
        raise BudgetError(
            f"keep={keep} has {len(keep)} numbers for {stages} stages; give one for each, or the "
            "last alone."
        )
    for kind in (int, float):
        same = [one for one in keep if isinstance(one, kind)]
        if same != sorted(same, reverse=True):
            raise BudgetError(
                f"keep={keep} rises; dropped tokens do not come back at a later stage."
            )


def pyramid(keep: int | float | tuple[int | float, ...], stages: int, available: int) -> list[int]:
    """The number of tokens after every stage, for an image of `available` visual tokens.

    Args:
        keep: Tokens after the last stage, or the fraction of `available`; the stages before go down
            to it in equal ratios. Or a tuple of one such number for each stage. Numbers of tokens
            are truncated.
        stages: How many stages there are.
        available: Visual tokens that the image came with.

    Returns:
        One number for each stage, none larger than the one before.

    Raises:
        BudgetError: A number is larger than the one before or than `available`, or is truncated to
            0.
    """
    check_pyramid(keep, stages)
    if isinstance(keep, tuple):
        wanted = [one if isinstance(one, int) else int(available * one) for one in keep]
    else:
        last = keep if isinstance(keep, int) else int(available * keep)
        share = keep / available if isinstance(keep, int) else keep
        # Rounded first: a cube root can miss a whole number by its last bit.
        between = [int(round(available * share ** (i / stages), 6)) for i in range(1, stages)]
        wanted = [*between, last]
    if min(wanted) < 1:
        raise BudgetError(
            f"keep={keep} of {available} visual tokens is truncated to 0; ask for at least 1."
        )
    before = available
    for count in wanted:
        before = budget(count, before)
    return wanted
