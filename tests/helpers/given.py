"""What tests of the caller's own masks and positions share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pore
from cases import CASES
from helpers.engine import tolerance
from helpers.families import refusal
from helpers.methods import EVERY, KEEP, in_decoder, model_of, usual
from helpers.models import IMAGE, N
from pore.engine.stages import Stage

CLOSE = tolerance("sdpa")


IN_DECODER = [name for name in EVERY if in_decoder(usual(name, KEEP))]


IN_TOWER = [name for name in EVERY if usual(name, KEEP).tower_stage is not None]


ELSEWHERE = [name for name in EVERY if name not in IN_TOWER]


ON_EMBEDDINGS = [
    name
    for name in ELSEWHERE
    if all(stage.layer == 0 for stage in usual(name, KEEP).stages() if isinstance(stage, Stage))
]


ANEW = [  # methods that number the positions of the tokens left anew
    name
    for name in EVERY
    if any(not isinstance(stage, Stage) or stage.dense for stage in usual(name, KEEP).stages())
]


def triangle(mask: Tensor) -> Tensor:
    """(B, 1, L, L) the causal mask for a 2-D mask; padding sees itself."""
    length = mask.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None]
    return (seen | torch.eye(length, dtype=torch.bool))[:, None]


def additive(mask: Tensor) -> Tensor:
    low = torch.finfo(torch.float64).min
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, low)


def run_of(name: str, inputs: Any, keep: float = KEEP, **more: Any) -> tuple[Tensor, pore.Run]:
    with torch.no_grad(), usual(name, keep)(model_of()) as run:
        return model_of()(**inputs, **more).logits, run


def columns_kept(run: pore.Run, inputs: Any) -> list[list[int]]:
    """For each sample, the columns that are left; only for methods that merge nothing."""
    found = []
    for sample, ids, mask in zip(
        run.report, inputs["input_ids"], inputs["attention_mask"], strict=True
    ):
        visual = (ids == IMAGE).nonzero().flatten().tolist()
        kept = {
            visual[N * image.image + raster] for image in sample.images for raster in image.kept
        }
        tokens = mask.nonzero().flatten().tolist()
        found.append([c for c in tokens if c in kept or c not in visual])
    return found


OTHER = [
    pytest.param(case, name, id=f"{case.name}-{name}")
    for case in CASES
    for name in ("FastV", "DivPrune", "VisionZip")
    if refusal(case, name) is None
]
