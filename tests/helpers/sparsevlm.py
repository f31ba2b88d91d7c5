"""SparseVLM with stages that are remembered."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import pore
from helpers.models import N, prompt
from pore.engine.stages import Selection, View
from pore.methods._sparsevlm import (
    Raters,
)

P = pore.PositionBias.exponential(0.3, N)
LAYERS = (1, 2, 4)
PROMPTS = [prompt(3, 2, 5), prompt(9, 0, 4, 1), prompt(1, 1, 1, 2)]
seeds = st.integers(0, 2**31)


KINDS = {1: pore.SparseVLM, 2: pore.SparseVLMPlus}


def pruner(version: int = 1, **settings: Any) -> pore.SparseVLM:
    return KINDS[version](**{"keep": 4, "layers": LAYERS, **settings})


def features(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def lengths(mask: Tensor) -> list[int]:
    return mask.sum(-1).tolist()  # type: ignore[no-any-return]


class Watching:
    """SparseVLM that remembers what its stages saw and chose."""

    def _select(self, stage: int, view: View) -> Selection:
        selection = super()._select(stage, view)
        seen.append((view, self.score(stage, view), selection))
        return selection

    def _rate(self, view: View) -> Raters:
        raters.append(super()._rate(view))
        return raters[-1]


class Spy(Watching, pore.SparseVLM):
    pass


class SpyPlus(Watching, pore.SparseVLMPlus):
    pass


seen: list[tuple[View, Tensor, Selection]] = []
raters: list[Raters] = []


def stages_of(
    model: Any, inputs: dict[str, Tensor], version: int = 1, **settings: Any
) -> list[Any]:
    """What every stage saw, how it scored and what it chose."""
    seen.clear()
    raters.clear()
    kind = Spy if version == 1 else SpyPlus
    with torch.no_grad(), kind(**{"keep": 4, "layers": LAYERS, **settings})(model):
        model(**inputs)
    return list(seen)
