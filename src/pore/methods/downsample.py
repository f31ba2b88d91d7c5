"""Down-sampling: much as if the image were smaller, a baseline that is hard to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, pad

from pore.engine.stages import Limit, Merges, Selection, Stage, View
from pore.errors import BudgetError, InputError
from pore.families.base import Family
from pore.methods.scorer import BudgetPruner
from pore.tensors.gathering import widened
from pore.tensors.selection import budget

_SQUARE = 1.5
"""How many times longer than wide a cell of a down-sampled grid may be."""


def fair_cells(grid: tuple[int, int], keep: int | float) -> int:
    """Number of cells for down-sampling: at least the budget, and without long, thin cells.

    14 tokens would be a grid of 2×7, which nobody would choose. The baseline gets the next number
    that makes a reasonable grid; the table says which number that is.

    Args:
        grid: Rows and columns of an image's visual tokens.
        keep: The budget.

    Returns:
        The number of cells.
    """
    for count in range(budget(keep, grid[0] * grid[1]), grid[0] * grid[1]):
        try:
            rows, columns = coarse_grid(grid, count)
        except BudgetError:
            continue
        aspect = (grid[0] * columns) / (grid[1] * rows)
        if 1 / _SQUARE <= aspect <= _SQUARE:
            return count
    return grid[0] * grid[1]


NO_GRID = "Visual tokens that fill no grid cannot be down-sampled."


# Cells more than four times as long as wide do not show an image any more.
_MAX_ASPECT = 4.0


@dataclass(frozen=True)
class Downsample(BudgetPruner):
    """Average the grid of visual embeddings down to `keep` cells, before the decoder.

    The counterpart of feeding a smaller image to a model whose tower takes one size only. VTC-Bench
    (arXiv 2510.07143) found that plain down-sampling beats many pruning methods, so a fair
    comparison needs it. The coarse grid is the one with exactly `keep` cells that is nearest to the
    image's own shape; positions are numbered anew, as for a smaller image.

    Attributes:
        keep: Cells per image (int), or the fraction of tokens kept (float).
        fair: Whether an image whose budget makes no grid, or one of long, thin cells, gets as many
            more as make a decent one; such a budget is refused otherwise.
    """

    fair: bool = False

    name: ClassVar[str] = "Downsample"
    paper: ClassVar[str] = "baseline; arXiv 2510.07143"
    merges: ClassVar[Merges] = "all"

    def stages(self) -> Sequence[Stage]:
        """One stage, on the embeddings."""
        return [Stage(0, self._pool, merges=True)]

    def limits(self, family: Family) -> list[Limit]:
        """Only tokens that fill a grid can be averaged on it."""
        found = super().limits(family)
        if family.tiles:
            found.append(
                Limit(
                    "visual tokens of tiles fill no grid to average on.", "images are in one piece"
                )
            )
        return found

    def _pool(self, view: View) -> Selection:
        layout = view.layout
        counts = self._counts(view)
        ends = torch.tensor(counts, device=layout.raster.device)[:, None]
        slots = torch.arange(layout.valid.shape[1], device=ends.device)
        every, raster, cells = view.features, layout.raster.clone(), []
        for i, (image, count) in enumerate(zip(layout.images, counts, strict=True)):
            if image.grid is None or layout.counts[i] != image.grid[0] * image.grid[1]:
                raise InputError(NO_GRID)
            pooled = _pooled(every[i, : len(image.columns)], image.grid, count)
            cells.append(pad(pooled, (0, 0, 0, every.shape[1] - count)))
            raster[i, :count] = _centres(image.grid, count).to(raster.device)
        return Selection(layout.valid & (slots < ends), torch.stack(cells), raster)

    def _counts(self, view: View) -> Sequence[int]:
        """The number of cells of every image."""
        counts = view.budget(self.keep)
        if not self.fair:
            return counts
        pairs = zip(view.layout.images, counts, strict=True)
        return [fair_cells(image.grid, n) if image.grid else n for image, n in pairs]


def _pooled(features: Tensor, grid: tuple[int, int], count: int) -> Tensor:
    """(h*w, D) features on a grid, averaged to (count, D)."""
    if count == features.shape[0]:
        return features
    cells = widened(features).T.reshape(1, -1, *grid)
    return adaptive_avg_pool2d(cells, coarse_grid(grid, count))[0].flatten(1).T.to(features)


def _centres(grid: tuple[int, int], count: int) -> Tensor:
    """Raster indices of the patches in the middle of the cells."""
    if count == grid[0] * grid[1]:
        return torch.arange(count)
    rows, columns = (
        ((2 * torch.arange(coarse) + 1) * fine // (2 * coarse))
        for coarse, fine in zip(coarse_grid(grid, count), grid, strict=True)
    )
    return (rows[:, None] * grid[1] + columns).flatten()


def coarse_grid(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """The grid of exactly `count` cells whose shape is nearest to that of a finer grid.

    Args:
        grid: (height, width) of the fine grid.
        count: Cells wanted.

    Returns:
        (height, width) with height * width == count, neither above the fine grid's.

    Raises:
        BudgetError: There is no such grid, or only one with far too long cells; the message names
            the nearest numbers that work.
    """
    fits = _grids(grid, count)
    if not fits:
        near = [c for c in range(1, grid[0] * grid[1] + 1) if _grids(grid, c)]
        below = max((c for c in near if c < count), default=None)
        above = min((c for c in near if c > count), default=None)
        names = " or ".join(str(c) for c in (below, above) if c is not None)
        raise BudgetError(
            f"No grid of {count} cells has a shape like {grid[0]}x{grid[1]}; keep {names} instead."
        )
    return min(fits, key=lambda shape: _stretch(grid, shape))


def _grids(grid: tuple[int, int], count: int) -> list[tuple[int, int]]:
    shapes = [(h, count // h) for h in range(1, grid[0] + 1) if count % h == 0]
    return [s for s in shapes if s[1] <= grid[1] and _stretch(grid, s) <= _MAX_ASPECT]


def _stretch(grid: tuple[int, int], shape: tuple[int, int]) -> float:
    """How many times longer than wide a cell gets, in units of the fine grid's cells."""
    ratio = (grid[0] / shape[0]) / (grid[1] / shape[1])
    return max(ratio, 1 / ratio)
