"""What a rule in a vision tower sees, and the same computed separately."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cases import CASES, COUSINS
from cases.base import Case
from pore.engine.pruner import Pruner
from pore.families.registry import family_of
from pore.tower.stages import TowerSelection, TowerStage, TowerView

MERGED = [
    case
    for case in [*CASES, *COUSINS]
    if family_of(case.model()).merged and not family_of(case.model()).packed
]
"""Families whose towers take images side by side, and make a token from several patches."""


class Looking(Pruner):
    """Keeps everything, and records what a rule sees."""

    keep = 1.0
    view: TowerView

    def stages(self) -> list[TowerStage]:
        return [TowerStage(self._look, layers=lambda read, _: range(read + 1))]

    def _look(self, view: TowerView) -> TowerSelection:
        self.view = view
        return view.select(view.shown, [view.features.shape[1]] * len(view.features))


def seen(case: Case, inputs: dict[str, Tensor]) -> TowerView:
    looking = Looking()
    with torch.no_grad(), looking(case.model()):
        case.model()(**inputs)
    return looking.view


def squares(values: Tensor, size: int) -> Tensor:
    """(..., P, d) of patches in raster order: their means over squares, in raster order."""
    side = round(values.shape[-2] ** 0.5)
    planes = values.unflatten(-2, (side, side)).movedim(-1, -3)
    shape = planes.shape
    means = nn.functional.avg_pool2d(planes.reshape(-1, side, side)[None], size)[0]
    return means.view(*shape[:-2], -1).mT


def attentions(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """(S, I, H, P) attention to the patches, of CLS or the mean, by transformers' eager code."""
    model = case.model()
    family = family_of(model)
    found: list[Tensor] = []
    hooks = [
        family.tower_attention(layer).register_forward_hook(
            lambda _, __, output: found.append(output[1])
        )
        for layer in family.tower_layers(model)
    ]
    family.tower(model).set_attn_implementation("eager")
    with torch.no_grad():
        model(**inputs)
    family.tower(model).set_attn_implementation("sdpa")
    for hook in hooks:
        hook.remove()
    weights = torch.stack(found)
    if not family.tower_has_cls(model):
        real = weights.sum(-2, keepdim=True) > 0  # no query sees what is padding
        return (weights * real.mT).sum(-2) / real.sum(-1)
    if not family.cls_first:
        weights = weights.roll((1, 1), (-2, -1))
    return weights[..., 0, 1:]
