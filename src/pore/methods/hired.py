"""HiRED: a fixed budget, divided among the tiles of an image by early CLS attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pore.engine.stages import Limit
from pore.errors import BudgetError, InputError
from pore.families.base import Family
from pore.layout import Tiling
from pore.methods._checks import check_share
from pore.methods.scorer import BudgetPruner
from pore.tensors.selection import budget, proportional_shares, top_k
from pore.tower.stages import TowerSelection, TowerStage, TowerView


@dataclass(frozen=True)
class HiRED(BudgetPruner):
    """Keep the patches with the largest CLS attention, with a budget per tile (arXiv 2408.10945).

    For an image in tiles, a share `alpha` of the tokens goes to the whole image at low resolution.
    The others are divided among the tiles, in proportion to how many of the whole image's int(N (1
    - alpha)) patches with the largest CLS attention in the tower's first layer lie in the part of
    the image that the tile shows. In each, the patches with the largest CLS attention at the layer
    whose output the projector reads stay, in raster order; attention is summed over heads. An image
    in one piece is pruned as by FasterVLM.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
        alpha: Share of the whole image among the tokens of an image in tiles.
        faithful: Divide the budget as the authors' code does. A fraction counts patches of padding
            too and is rounded down, budgets of tiles are rounded down, and padding can be chosen,
            so that fewer than `keep` reach the decoder. The map of the whole image is cut into one
            horizontal band for every tile; by default each patch counts for the tile that shows it.
            A grid of tiles that is not square is laid out as if transposed, and what then looks
            like padding is cut off, although most of it is image. Newline tokens are dropped; by
            default they stay, as with every method here.
    """

    alpha: float = 0.5
    faithful: bool = False

    name: ClassVar[str] = "HiRED"
    paper: ClassVar[str] = "arXiv 2408.10945"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(alpha=self.alpha)

    def stages(self) -> Sequence[TowerStage]:
        """One stage, in the tower."""
        return [TowerStage(self._select, layers=lambda read, _: [0, read])]

    def limits(self, family: Family) -> list[Limit]:
        """The budget is divided by where tiles lie in the image."""
        found = super().limits(family)
        if family.tiles and not family.tiles_placed:
            found.append(
                Limit(
                    "it divides the budget by where tiles lie in the image, which the prompts do "
                    "not say.",
                    "images are in one piece",
                )
            )
        return found

    def _select(self, view: TowerView) -> TowerSelection:
        early, late = view.cls_attention.sum(2).unbind(0)
        shown = torch.ones_like(view.shown) if self.faithful else view.shown
        if view.of_frames:
            if self.faithful:
                raise InputError(
                    "The authors' code knows only images; leave `faithful` off for a video."
                )
            counts = view.budgets(self.keep)
        elif view.tilings is None:
            n = late.shape[1]
            counts = [self._total(n)] * len(late)
        else:
            rooms: list[int] = shown.sum(1).tolist()
            counts = []
            for tiling in view.tilings:
                start = len(counts)
                room = rooms[start : start + tiling.tiles]
                first = room.pop(tiling.whole)
                each = self._of_tiles(tiling, early[start + tiling.whole], [first, *room])
                whole, *others = each
                counts += [*others[: tiling.whole], whole, *others[tiling.whole :]]
        selection = view.select(top_k(late, counts, shown), counts, structure=not self.faithful)
        if not self.faithful or view.tilings is None:
            return selection
        ranks = torch.cat([ranks_of(tiling) for tiling in view.tilings]).to(late.device)
        return replace(selection, order=ranks.gather(1, selection.raster))

    def _total(self, patches: int) -> int:
        """Tokens kept of an image with this number of patches."""
        if not self.faithful or isinstance(self.keep, int):
            return budget(self.keep, patches)
        if (total := int(patches * self.keep)) == 0:
            raise BudgetError(
                f"keep={self.keep} of {patches} patches rounds down to none; ask for more."
            )
        return total

    def _of_tiles(self, tiling: Tiling, early: Tensor, room: list[int]) -> list[int]:
        """Tokens kept of every tile.

        Args:
            tiling: The image's tiles.
            early: (N,) attention in the first layer to the patches of the whole image.
            room: The most that every tile can keep, the whole image first.

        Returns:
            The numbers, in that order.
        """
        n, tiles = tiling.patches, tiling.tiles - 1
        total = self._total(sum(room))
        whole = min(int(total * self.alpha), room[0])
        if not self.faithful:
            whole = max(whole, total - sum(room[1:]))
        if whole == total:
            return [whole, *[0] * tiles]
        if tiling.apart and self.faithful:
            raise InputError(
                "The authors' code knows only the tiles of LLaVA-NeXT; leave `faithful` off."
            )
        if tiling.grid is None:
            raise InputError(
                "HiRED divides the budget by where the tiles lie in the image, which the prompts "
                "of this model do not say; use another method, or images in one tile."
            )
        mark = top_k(early[None], [int(n * (1 - self.alpha))])[0]
        where = bands(n, tiles) if self.faithful else regions(tiling)
        hits = where.to(mark.device)[mark].bincount(minlength=tiles).tolist()
        if not self.faithful:
            return [whole, *proportional_shares(total - whole, hits, room[1:])]
        if not any(hits):
            raise BudgetError(
                f"The authors' code divides by zero with alpha={self.alpha}, which leaves no patch "
                "of the whole image to divide the budget by; use faithful=False."
            )
        left = min(total - whole, sum(room[1:]))
        counts = [whole, *(min(part, n) for part in truncated_shares(hits, left))]
        if not any(counts):
            raise BudgetError(
                f"keep={self.keep} rounds down to 0 tokens in every tile; ask for more, or "
                "faithful=False."
            )
        return counts


def truncated_shares(hits: Sequence[int], total: int) -> list[int]:
    """The authors' shares of a number in proportion to hits: computed in float32 and truncated.

    A whole share can lose one in this way: 7 of 24 hits give 62 of 216, not 63.

    Args:
        hits: What the shares are in proportion to, not all 0.
        total: The number to divide.

    Returns:
        One share for each; their sum can be less than `total`.
    """
    marks = torch.tensor(hits)
    shares: list[int] = (marks / marks.sum() * total).int().tolist()
    return shares


def ranks_of(tiling: Tiling) -> Tensor:
    """The authors' order of the patches of an image in tiles.

    Their packing mistakes the columns of the grid of tiles for its rows, as transformers did at the
    time, and then cuts off as padding what lies outside the image's own shape.

    Args:
        tiling: The image's tiles, the whole image first.

    Returns:
        (tiles, N) rank of every patch among those that are not cut off, -1 for the others.
    """
    if tiling.size is None or tiling.grid is None or tiling.grid[0] == tiling.grid[1]:
        order = torch.tensor(tiling.shown)
    else:
        side, (rows, columns) = round(tiling.patches**0.5), tiling.grid
        numbers = torch.arange(tiling.patches, tiling.tiles * tiling.patches)
        canvas = numbers.view(columns, rows, side, side).transpose(1, 2).flatten(2).flatten(0, 1)
        (height, width), (high, wide) = tiling.size, canvas.shape
        if width / height > wide / high:
            cut = (high - int(height * (wide / width))) // 2
            canvas = canvas[cut : high - cut]
        else:
            cut = (wide - int(width * (high / height))) // 2
            canvas = canvas[:, cut : wide - cut]
        order = torch.cat([torch.arange(tiling.patches), canvas.flatten()])
    ranks = torch.full((tiling.tiles * tiling.patches,), -1)
    ranks[order] = torch.arange(len(order))
    return ranks.view(tiling.tiles, tiling.patches)


def regions(tiling: Tiling) -> Tensor:
    """Which tile shows the middle of every patch of the whole image.

    The whole image is the tiles' canvas without its padding, whatever its shape.

    Args:
        tiling: An image's tiles.

    Returns:
        (N,) tiles from 0, row by row, not counting the whole image.
    """
    side = round(tiling.patches**0.5)
    assert tiling.grid is not None
    columns = tiling.grid[1]
    slots = torch.tensor(tiling.shown)
    slots = slots[slots // tiling.patches != tiling.whole]
    tile, patch = slots // tiling.patches, slots % tiling.patches
    tile = tile - (tile > tiling.whole).long()
    middles = (torch.arange(side) + 0.5) / side
    places = []
    for line in (tile // columns * side + patch // side, tile % columns * side + patch % side):
        first, last = line.min(), line.max() + 1
        places.append((first + middles * (last - first)).long() // side)
    numbers: Tensor = places[0][:, None] * columns + places[1]
    return numbers.flatten()


def bands(patches: int, tiles: int) -> Tensor:
    """The authors' map: patches in raster order, cut into one run for every tile.

    Raises:
        BudgetError: The runs would not be equal, where the authors' code stops with an error.
    """
    if patches % tiles:
        raise BudgetError(
            f"The authors' code stops with an error where {patches} patches cannot be cut into "
            f"{tiles} equal runs, one for every tile; use faithful=False."
        )
    return torch.arange(patches) // (patches // tiles)
