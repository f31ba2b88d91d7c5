"""HiPrune: object patches by a middle tower layer, their neighbours, and others by a deep one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pore.cost.shapes import ModelShape
from pore.errors import BudgetError, InputError
from pore.methods._checks import check_share
from pore.methods.scorer import BudgetPruner
from pore.tensors.attention import received_attention
from pore.tensors.selection import budget, top_k
from pore.tower.stages import TowerSelection, TowerStage, TowerView


@dataclass(frozen=True)
class HiPrune(BudgetPruner):
    """Keep anchors, the buffers around them, and registers (arXiv 2508.00553).

    All rank by the attention that a patch receives in the vision tower, averaged over heads and
    queries. Anchors are the round(keep * alpha / 5) highest of `object_layer`, buffers their
    neighbours above, below, left and right; registers, the highest of the others at the layer whose
    output the projector reads, fill up to `keep`. Kept patches stay in raster order. Every tile of
    an image is pruned by itself, with an even share of `keep`.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
        alpha: Share of them for anchors and buffers.
        object_layer: 0-based index of the tower layer that finds objects; the authors' 9 of 24,
            counted from 1.
        faithful: Neighbours as in the authors' code: one place before and after in raster order,
            even across the ends of rows; neighbours outside the image become its first or last
            patch. If anchors and buffers are more than `keep`, it stops with an error, as their
            code does. In tiled images every tile gets keep // tiles, including patches of padding,
            which the decoder never gets. Default: neighbours on the grid, and at most keep // 5
            anchors.
    """

    alpha: float = 0.1
    object_layer: int = 8
    faithful: bool = False

    name: ClassVar[str] = "HiPrune"
    paper: ClassVar[str] = "arXiv 2508.00553"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(alpha=self.alpha)

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> HiPrune:
        """The object layer at 9/24 of the tower's depth."""
        return cls(keep, object_layer=max(round(shape.tower_layers * 9 / 24) - 1, 0))

    def stages(self) -> Sequence[TowerStage]:
        """One stage, in the tower."""
        return [TowerStage(self._select, layers=lambda read, _: [self.object_layer, read])]

    def _select(self, view: TowerView) -> TowerSelection:
        n = view.features.shape[1]
        side = math.isqrt(n)
        grid = view.grid or (side, side)
        if grid[0] * grid[1] != n:
            raise InputError(f"{n} patches lie on no square grid, so no patch has neighbours.")
        with torch.no_grad():
            objects, deep = (
                view.pooled(received_attention(q, k, q.shape[-1] ** -0.5, view.real).mean(1))[
                    :, -n:
                ]  # without CLS
                for q, k in zip(view.queries, view.keys, strict=True)
            )
        shown, counts = view.shown, view.budgets(self.keep)
        if self.faithful:
            shown, counts = torch.ones_like(shown), _whole_shares(view, self.keep)
        anchors = [round(count * self.alpha / 5) for count in counts]
        if not self.faithful:
            anchors = [min(some, count // 5) for some, count in zip(anchors, counts, strict=True)]
        mask = top_k(objects, anchors, shown)
        mask = (mask | neighbours(mask, grid, wrap=self.faithful)) & shown
        left = torch.tensor(counts, device=mask.device) - mask.sum(1)
        if self.faithful and bool((left < 0).any()):
            raise BudgetError(
                f"alpha={self.alpha} gives more anchors and buffers than the {counts} tokens to be "
                "kept, where the authors' code stops; lower alpha, or leave faithful=True out."
            )
        return view.select(mask | top_k(deep, left, shown & ~mask), counts)


def neighbours(mask: Tensor, grid: tuple[int, int], wrap: bool = False) -> Tensor:
    """The patches above, below, left and right of marked ones.

    Args:
        mask: (I, N) bool, in raster order.
        grid: (height, width) of the N.
        wrap: Whether left and right run on across the ends of rows, and the first and last patch
            stand for what lies before and after all.

    Returns:
        (I, N) bool.
    """
    height, width = grid
    near = torch.zeros_like(mask)
    if wrap:
        images, places = mask.nonzero(as_tuple=True)
        for step in (-1, 1, -width, width):
            near[images, (places + step).clamp(0, height * width - 1)] = True
        return near
    plane, found = mask.view(-1, height, width), near.view(-1, height, width)
    found[:, 1:] |= plane[:, :-1]
    found[:, :-1] |= plane[:, 1:]
    found[:, :, 1:] |= plane[:, :, :-1]
    found[:, :, :-1] |= plane[:, :, 1:]
    return near


def _whole_shares(view: TowerView, keep: int | float) -> list[int]:
    """The authors' share of every tile; the remainder is lost."""
    n = view.features.shape[1]
    return [budget(keep, count * n) // count for count in view.tiles for _ in range(count)]
