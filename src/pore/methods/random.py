"""Random pruning: the baseline that any score must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from pore.engine.limits import check_layer
from pore.engine.pruner import Pruner
from pore.engine.stages import Selection, Stage, View
from pore.errors import ScoreError
from pore.families.base import Family
from pore.tensors.selection import check_keep, top_k


@dataclass(frozen=True)
class Random(Pruner):
    """Keep visual tokens drawn uniformly, without a score.

    Draws are made image by image from one generator that each run seeds anew, so a run over the
    same images in the same order keeps the same tokens, whatever the batches.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
        layer: The 0-based index of the first pruned layer, as in FastV.
        seed: Seed of the draws.
    """

    keep: int | float
    layer: int = 2
    seed: int = 0

    name: ClassVar[str] = "Random"
    paper: ClassVar[str] = "baseline"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if not -(2**63) <= self.seed < 2**64:
            raise ScoreError(f"seed={self.seed} is no number of 64 bits.")

    def stages(self) -> Sequence[Stage]:
        """One stage, before the chosen layer."""
        return [Stage(self.layer, self._select)]

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse a layer that the decoder lacks."""
        check_layer(self.layer, family, model)

    def _select(self, view: View) -> Selection:
        valid = view.layout.valid
        scores = torch.zeros(valid.shape)
        for row, count in enumerate(view.layout.counts):
            scores[row, :count] = torch.rand(count, generator=view.generator)
        return Selection(top_k(scores.to(valid.device), view.budget(self.keep), valid))
