"""Random pruning: the baseline that any score must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pore.engine.stages import View
from pore.errors import ScoreError
from pore.methods.scorer import ScoredPruner


@dataclass(frozen=True)
class Random(ScoredPruner):
    """Keep visual tokens drawn uniformly, without a score.

    Draws are made image by image from one generator that each run seeds anew, so a run over the
    same images in the same order keeps the same tokens, whatever the batches.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
        layer: The 0-based index of the first pruned layer, as in FastV.
        seed: Seed of the draws.
    """

    seed: int = 0

    name: ClassVar[str] = "Random"
    paper: ClassVar[str] = "baseline"
    draws: ClassVar[bool] = True
    earliest: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -(2**63) <= self.seed < 2**64:
            raise ScoreError(f"seed={self.seed} does not fit into 64 bits.")

    def score(self, view: View) -> Tensor:
        """Numbers drawn for every image from the run's generator."""
        valid = view.layout.valid
        scores = torch.zeros(valid.shape)
        for row, count in enumerate(view.layout.counts):
            scores[row, :count] = torch.rand(count, generator=view.generator)
        return scores.to(valid.device)
