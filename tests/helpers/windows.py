"""A method that keeps the same few tokens of every image, at any layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from pore.engine.pruner import Pruner
from pore.engine.stages import Positions, Selection, Stage, View


@dataclass(frozen=True)
class Some(Pruner):
    """Keeps the same few tokens of every image."""

    layers: tuple[int, ...]
    positions: Positions = "original"
    kept = ((0, 1, 5, 6, 11, 14, 15), (1, 6, 14))

    def stages(self) -> list[Stage]:
        return [
            Stage(layer, partial(self._rule, kept), positions=self.positions)
            for layer, kept in zip(self.layers, self.kept, strict=False)
        ]

    @staticmethod
    def _rule(kept: Sequence[int], view: View) -> Selection:
        chosen = torch.isin(view.layout.raster, torch.tensor(kept)) & view.layout.valid
        return Selection(chosen)
