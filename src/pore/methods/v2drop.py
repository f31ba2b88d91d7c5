"""V2Drop: visual tokens whose states hardly change from one decoder layer to the next go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pore.cost.shapes import ModelShape
from pore.engine.stages import Stage, View
from pore.errors import InputError
from pore.methods.pyramiddrop import check_pyramid, pyramid
from pore.methods.staged import StagedPruner
from pore.tensors.gathering import widened
from pore.tensors.selection import budget


@dataclass(frozen=True)
class V2Drop(StagedPruner):
    """Keep the visual tokens whose states change most in the layer before (arXiv 2509.01552).

    Before each of `layers` a token's score is the length of the difference between its state now
    and its state when it entered the layer before (after that layer's pruning, if it prunes too).
    States are those between the layers, without a norm. Tokens with the largest differences stay,
    with their positions. The method reads neither attention nor text, and has no `reweight`.

    The authors prune three times in LLaVA-1.5: to a half, to a quarter, and in the end to one
    token. That is `V2Drop(keep=1)`.

    Attributes:
        keep: Tokens per image after the last stage (int), or the fraction of the original number
            (float). The stages before leave a half, a quarter and so on of the original number,
            rounded down, but not fewer than that. Or a tuple: what is left of the original number
            after every stage.
        layers: The 0-based index of the first layer of every stage that sees fewer tokens.
        faithful: Drop the same tokens in every image of a batch as in its first one, as the
            authors' code does; all must have equally many tokens.
    """

    keep: int | float | tuple[int | float, ...]
    layers: tuple[int, ...] = (3, 17, 22)
    faithful: bool = False

    name: ClassVar[str] = "V2Drop"
    paper: ClassVar[str] = "arXiv 2509.01552"

    def __post_init__(self) -> None:
        super().__post_init__()
        keep = self.keep if isinstance(self.keep, tuple) else (self.keep,) * len(self.layers)
        check_pyramid(keep, len(self.layers))

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> V2Drop:
        """Stages where the authors have them in 32 layers."""
        depth = shape.decoder.layers
        return cls(keep, tuple(sorted({max(1, round(depth * i / 32)) for i in (3, 17, 22)})))

    def reader(self) -> None:
        """No attention is read."""

    def stages(self) -> Sequence[Stage]:
        """One stage before each of `layers`, which looks back at the layer before."""
        return [replace(stage, earlier=stage.layer - 1) for stage in super().stages()]

    def remaining(self, visual: int) -> Sequence[int]:
        """Tokens left after every stage, for an image that came with `visual` tokens."""
        if isinstance(self.keep, tuple):
            return pyramid(self.keep, len(self.layers), visual)
        last = budget(self.keep, visual)
        return [*(max(last, visual >> i) for i in range(1, len(self.layers))), last]

    def must_meet(self, stage: int) -> bool:
        """Numbers that were given one by one are all to be met."""
        return isinstance(self.keep, tuple) or super().must_meet(stage)

    def score(self, stage: int, view: View) -> Tensor:
        """How far the states have moved."""
        assert view.earlier is not None
        scores = variation(view.layout.gather(view.earlier), view.features)
        if not self.faithful:
            return scores
        if not bool(view.layout.valid.all()):
            raise InputError(
                "The authors' code drops the same tokens in all images of a batch, but these have "
                "different numbers of tokens; leave faithful=True out."
            )
        return scores[:1].expand_as(scores)


def variation(before: Tensor, after: Tensor) -> Tensor:
    """How far states have moved.

    Args:
        before: (I, t, D) states.
        after: (I, t, D) states of the same tokens.

    Returns:
        (I, t) lengths of the differences, at least float32.
    """
    moved: Tensor = torch.linalg.vector_norm(widened(after) - widened(before), dim=-1)
    return moved
