"""PyramidDrop: several pruning points inside the decoder, each ranked by the layer it prunes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from pore.engine.pruner import Pruner
from pore.engine.readers import LastToken
from pore.engine.stages import Index, Selection, Stage, View
from pore.errors import BudgetError, ScoreError
from pore.families.base import Family
from pore.methods.staged import bias_of_each, check_layers, check_stages, freeze
from pore.tensors.selection import budget, check_keep, top_k

if TYPE_CHECKING:
    from pore.bias.position_bias import PositionBias
    from pore.cost.shapes import ModelShape


@dataclass(frozen=True)
class PyramidDrop(Pruner):
    """Drop visual tokens in stages, fewer and fewer with depth (arXiv 2410.17247).

    Before each of `layers`, the visual tokens that are left are ranked by the attention of the last
    text token, averaged over heads, and the lowest are dropped. The attention is that of the layer
    itself: its queries and keys are computed once in advance, on all that enters it. Those that
    stay are numbered anew, so every layer sees positions without gaps, and a decoded token has in
    every layer the position that follows what this layer has cached.

    With `reweight=P` the ranking is by A / P. `index="original"` reads P where a token was in the
    image, as P is measured; "dense" reads it at the distance that the token has to the text now
    that positions are numbered anew.

    Attributes:
        keep: Tokens per image behind the last stage (int), or the fraction of the original number
            (float); the stages before come down to it in equal ratios, so that 0.125 in three
            stages is the authors' 0.5, 0.25, 0.125. Or a tuple: what is left of the original number
            behind every stage. Fractions are truncated, as by the authors: 0.125 of 37 is 4.
        layers: The first layer of every stage, the authors' `layer_list`: 8 stands for eight layers
            that see what the stage drops.
        reweight: The position bias P, or one for every stage, or None.
        index: Where P is read: "original" or "dense".
    """

    keep: int | float | tuple[int | float, ...]
    layers: tuple[int, ...] = (8, 16, 24)
    reweight: PositionBias | tuple[PositionBias, ...] | None = None
    index: Index = "original"

    name: ClassVar[str] = "PyramidDrop"
    paper: ClassVar[str] = "arXiv 2410.17247"
    reweightable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        freeze(self, "keep", "layers", "reweight")
        check_layers(self.layers)
        check_pyramid(self.keep, len(self.layers))
        bias_of_each(self.reweight, len(self.layers))
        if self.index not in ("original", "dense"):
            raise ScoreError(f"index must be 'original' or 'dense', not {self.index!r}.")

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> PyramidDrop:
        """Stages at a quarter, half and three quarters of the decoder."""
        depth = shape.decoder.layers
        return cls(keep, tuple(sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)})))

    def stages(self) -> Sequence[Stage]:
        """One stage before each of `layers`, ranked by that layer's own attention."""
        return [
            Stage(layer, partial(self._select, i), LastToken(), ahead=True, positions="dense")
            for i, layer in enumerate(self.layers)
        ]

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse layers that the decoder lacks, and biases measured under other conditions."""
        biases = bias_of_each(self.reweight, len(self.layers))
        check_stages(self.stages(), biases, family, model)

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image that enter every decoder layer."""
        found = [visual] * layers
        for layer, count in zip(self.layers, self._counts(visual), strict=True):
            found[layer:] = [count] * (layers - layer)
        return found

    def _counts(self, visual: int) -> list[int]:
        return pyramid(self.keep, len(self.layers), visual)

    def _select(self, stage: int, view: View) -> Selection:
        scores, valid = view.attention, view.layout.valid
        counts = torch.tensor(view.budget(lambda n: self._counts(n)[stage]), device=valid.device)
        if not isinstance(self.keep, tuple) and stage < len(self.layers) - 1:
            # A method before this one in a chain may have left fewer than a stage on the way does.
            counts = torch.minimum(counts, valid.sum(-1))
        bias = bias_of_each(self.reweight, len(self.layers))[stage]
        if bias is not None:
            scores = view.reweighted(scores, bias, self.index)
        return Selection(top_k(scores, counts, valid))


def check_pyramid(keep: int | float | tuple[int | float, ...], stages: int) -> None:
    """Refuse a `keep` that cannot be meant.

    Args:
        keep: What is left behind the last stage, or behind each of them.
        stages: How many stages there are.

    Raises:
        BudgetError: A number is none of tokens nor a fraction, there is not one for every stage,
            or a later one is larger.
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
            raise BudgetError(f"keep={keep} rises from stage to stage; dropped tokens stay so.")


def pyramid(keep: int | float | tuple[int | float, ...], stages: int, available: int) -> list[int]:
    """The number of tokens behind every stage, for an image of `available` visual tokens.

    Args:
        keep: Tokens behind the last stage, or the fraction of `available`; the stages before come
            down to it in equal ratios. Or a tuple of one such number for each stage. Fractions of
            tokens are cut off.
        stages: How many stages there are.
        available: Visual tokens that the image came with.

    Returns:
        One number for each stage, none larger than the one before.

    Raises:
        BudgetError: A number is larger than the one before or than `available`, or is cut to 0.
    """
    check_pyramid(keep, stages)
    if isinstance(keep, tuple):
        wanted = [one if isinstance(one, int) else int(available * one) for one in keep]
    else:
        last = keep if isinstance(keep, int) else int(available * keep)
        share = keep / available if isinstance(keep, int) else keep
        # Rounded first, for a cube root that misses a whole number by its last bit.
        between = [int(round(available * share ** (i / stages), 6)) for i in range(1, stages)]
        wanted = [*between, last]
    if min(wanted) < 1:
        raise BudgetError(
            f"keep={keep} of {available} visual tokens is cut to none; ask for at least 1."
        )
    before = available
    for count in wanted:
        before = budget(count, before)
    return wanted
