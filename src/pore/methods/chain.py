"""Several methods one after another, each applied to what the one before left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from pore.engine.pruner import Pruner
from pore.engine.stages import Limit, Stage
from pore.errors import BudgetError
from pore.families.base import Family
from pore.tower.stages import TowerStage


@dataclass(frozen=True, init=False)
class Chain(Pruner):
    """Methods in the order of the data's way: `Chain(FasterVLM(keep=192), FastV(keep=64))`.

    Every visual token keeps its raster index, so that a later method reads its position bias at the
    patch that a token stands for, not at its place in the shorter sequence. Every
    `keep` counts from the image as it came: a float is a fraction of all its tokens.

    Attributes:
        methods: The methods.
    """

    methods: tuple[Pruner, ...]

    paper = "composition"

    def __init__(self, *methods: Pruner) -> None:
        """Put methods one after another.

        Args:
            methods: Two or more, by where they act: vision tower, embeddings, decoder layers.

        Raises:
            BudgetError: They are not in this order, or there are fewer than two.
        """
        object.__setattr__(self, "methods", tuple(methods))
        if len(methods) < 2:
            raise BudgetError("A chain takes two or more methods; use a single one by itself.")
        if any(isinstance(method, Chain) for method in methods):
            raise BudgetError("A chain takes methods, not chains; give all of them to one chain.")
        for one, other in pairwise(methods):
            self._check_order(one, other)

    @property
    def name(self) -> str:  # type: ignore[override]
        """The names of the methods, such as `"FasterVLM + FastV"`."""
        return " + ".join(method.name for method in self.methods)

    @property
    def seed(self) -> int:
        """Seed of the first method that draws."""
        return next((m.seed for m in self.methods if hasattr(m, "seed")), 0)

    def stages(self) -> Sequence[Stage | TowerStage]:
        """The stages of all methods."""
        return [stage for method in self.methods for stage in method.stages()]

    def stages_in(self, depth: int) -> Sequence[Stage | TowerStage]:
        """The stages of all methods in a decoder of `depth` layers."""
        return [stage for method in self.methods for stage in method.stages_in(depth)]

    def limits(self, family: Family) -> list[Limit]:
        """The limits of all methods."""
        return [limit for method in self.methods for limit in method.limits(family)]

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse a model that the settings of a method do not fit."""
        for method in self.methods:
            method.check(model, family)

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image that enter every decoder layer."""
        every = [method.counts(visual, layers) for method in self.methods]
        return [min(layer) for layer in zip(*every, strict=True)]

    @staticmethod
    def _check_order(one: Pruner, other: Pruner) -> None:
        before, after = one.stages()[-1], other.stages()[0]
        both = f"{one.name} cannot come before {other.name}"
        if isinstance(after, TowerStage):
            raise BudgetError(
                f"{both}: {other.name} acts in the vision tower, so it must be the first, and only "
                "one method can act there."
            )
        if isinstance(before, TowerStage) or before.layer == after.layer == 0:
            return
        if after.layer <= before.layer:
            raise BudgetError(
                f"{both}: it acts before layer {before.layer} of the decoder, {other.name} before "
                f"layer {after.layer}; put them in order, or give the second a later layer."
            )
        if before.layer > 0 and before.dense and not after.dense:
            raise BudgetError(
                f"{both}: it numbers positions anew inside the decoder, and {other.name} keeps the "
                "original ones."
            )
