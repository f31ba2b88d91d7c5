"""The attention of a decoder layer, as a stage reads it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from cases.base import Case
from helpers.families import together
from pore.engine.readers import LastToken, LayerAttention
from pore.engine.stages import Stage
from pore.engine.watching import Watcher, keep_all


@cache
def under(case: Case, attention: str) -> Case:
    """A case's model under another attention implementation."""
    other = type(case)()
    config = other.model().model.language_model.config
    config._attn_implementation_internal = attention
    return other


def weights(case: Case, inputs: dict[str, Tensor], layer: int, ahead: bool = False) -> Tensor:
    """(I, H, L, L) the attention of a decoder layer as a stage reads it, row by row."""
    read: list[Tensor] = []

    def told(_: int, attention: LayerAttention, __: object) -> None:
        length = attention.query.shape[2]
        rows = torch.arange(length).expand(len(attention.layout.images), -1)
        read.append(attention.logits(rows).softmax(-1))

    stage = Stage(layer if ahead else layer + 1, keep_all, LastToken(), ahead=ahead)
    together(case, Watcher("a test", [stage], told), inputs)
    return read[0]
