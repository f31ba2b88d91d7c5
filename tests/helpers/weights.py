"""The attention of a decoder layer, as a stage reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cases.base import Case
from helpers.families import together
from pore.engine.pruner import Pruner
from pore.engine.readers import LayerAttention
from pore.engine.stages import Selection, Stage

Attend = Callable[[LayerAttention], Any]


@cache
def under(case: Case, attention: str) -> Case:
    """A case's model under another attention implementation."""
    other = type(case)()
    config = other.model().model.language_model.config
    config._attn_implementation_internal = attention
    return other


@dataclass(frozen=True)
class Watch(Pruner):
    """Drops nothing, and shows the attention at a stage."""

    layer: int
    attend: Attend
    ahead: bool = False

    def stages(self) -> list[Stage]:
        return [
            Stage(
                self.layer,
                lambda view: Selection(view.layout.valid),
                attention=self.attend,
                ahead=self.ahead,
            )
        ]


def weights(case: Case, inputs: dict[str, Tensor], layer: int, ahead: bool = False) -> Tensor:
    """(I, H, L, L) the attention of a decoder layer as a stage reads it, row by row."""
    read: list[Tensor] = []

    def attend(attention: LayerAttention) -> None:
        length = attention.query.shape[2]
        rows = torch.arange(length).expand(len(attention.layout.images), -1)
        read.append(attention.logits(rows).softmax(-1))

    together(case, Watch(layer if ahead else layer + 1, attend, ahead), inputs)
    return read[0]
