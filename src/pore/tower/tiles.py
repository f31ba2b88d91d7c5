"""Tiles: which image they belong to, and where their remaining tokens lie in the prompt.

An image that a family cuts into tiles goes through the vision tower as several pictures. Of a
2 × 1 grid with an overview, say, tile 0 is the whole image at low resolution, and tiles 1 and 2 are
its halves. The decoder gets their tokens in one of two ways:

- Each tile owns a run of placeholders (`Tiling.apart`; InternVL, Idefics3): all tokens of tile 0,
  then all of tile 1. What is left of a tile stays in its run.
- The tiles are laid side by side and read row by row across all of them (LLaVA-NeXT), patches of
  nothing but padding left out. What is left is put into that order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pore.errors import BudgetError
from pore.layout import Tiling
from pore.tower.stages import TowerSelection, TowerView


def tiles_of(tilings: Sequence[Tiling] | None, image: int) -> slice:
    """Which pictures of those that went through the tower are the tiles of an image.

    Args:
        tilings: The tiling of every image, in order; None if each goes in one piece.
        image: The number of the image.
    """
    if tilings is None:
        return slice(image, image + 1)
    first = sum(tiling.tiles for tiling in tilings[:image])
    return slice(first, first + tilings[image].tiles)


def in_own_runs(tiling: Tiling, raster: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """Where tokens lie if every tile owns a run of placeholders: where the model put them.

    Args:
        tiling: The tiling of an image with T tiles.
        raster: (T, k) the patch of its tile that each token stands for, -1 for none.
        stays: (T, k) bool, which of them stay.

    Returns:
        slots (n,), the placeholder of the image that each of the n tokens that stay fills; and
        places (n,), which of the image's visual tokens it is, -1 for none.
    """
    first = torch.arange(tiling.tiles, device=raster.device)[:, None] * tiling.patches
    slots = first + torch.arange(raster.shape[1], device=raster.device)
    places = torch.where(raster < 0, -1, first + raster)
    return slots[stays], places[stays]


def in_prompt_order(
    tiling: Tiling, raster: Tensor, stays: Tensor, rank: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The order in which the prompt has the tokens of tiles that are laid side by side.

    Args:
        tiling: The tiling of an image with T tiles.
        raster: (T, k) the patch of its tile that each token stands for, -1 for none.
        stays: (T, k) bool, which of them stay.
        rank: (T, k) an order that the method chooses, -1 for tokens that it leaves out; None takes
            the prompt's order, with tokens that stand for no patch last.

    Returns:
        chosen (n,), the tokens in order, as tile * k + number; and places (n,), which of the
        image's visual tokens each is, -1 for none.

    Raises:
        BudgetError: They are more than the image has placeholders.
    """
    shown = torch.tensor(tiling.shown, device=raster.device)
    # Of every patch of every tile: which visual token shows it.
    token = torch.full((tiling.tiles * tiling.patches,), -1, device=raster.device)
    token[shown] = torch.arange(len(shown), device=raster.device)
    places = token.view(tiling.tiles, -1).gather(1, raster.clamp(min=0))
    places = places.masked_fill(raster < 0, -1)
    if rank is None:
        seen = (places >= 0) | (raster < 0)  # what shows nothing but padding is not in the prompt
        rank = places.masked_fill(places < 0, len(shown))
    else:
        seen = rank >= 0
    chosen = (seen & stays).flatten().nonzero()[:, 0]
    if len(chosen) > len(shown):
        raise BudgetError(
            f"{len(chosen)} tokens are left of an image that the prompt has {len(shown)} for; "
            "keep fewer."
        )
    chosen = chosen[rank.flatten()[chosen].argsort(stable=True)]
    return chosen, places.flatten()[chosen]


def whole_if_all_shown(selection: TowerSelection, view: TowerView) -> TowerSelection:
    """Replace a selection of all that the prompt shows by the tower's whole output.

    Then patches of nothing but padding are projected too, although the decoder never gets them.
    Without them sums would round differently, and keeping all would not equal no pruning, bit for
    bit.
    """
    valid = selection.valid
    if valid is None or view.tilings is None or selection.order is not None:
        return selection
    shown = view.shown
    if int(valid.sum()) != int(shown.sum()) or bool((selection.raster[valid] < 0).any()):
        return selection
    rows = torch.arange(len(valid), device=valid.device)[:, None].expand_as(valid)[valid]
    places = selection.raster[valid]
    same = torch.equal(selection.features[valid], view.features[rows, places])
    if not same or not bool(shown[rows, places].all()):
        return selection
    return TowerSelection(view.features, view.raster, None, selection.structure)
