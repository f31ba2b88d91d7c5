"""Which tiles are of which image, and where in the prompt what is left of them comes."""

from __future__ import annotations

import pytest
import torch

from pore.errors import BudgetError
from pore.layout import Tiling
from pore.tower.tiles import in_own_runs, in_prompt_order, tiles_of

ALL = torch.ones(2, 3, dtype=torch.bool)


def test_tiles_of_images_in_a_row() -> None:
    tilings = [Tiling(count, None, 4, tuple(range(4 * count))) for count in (3, 1, 5)]
    tiles = [tiles_of(tilings, i) for i in range(3)]
    assert [list(range(9))[one] for one in tiles] == [[0, 1, 2], [3], [4, 5, 6, 7, 8]]
    assert list(range(9))[tiles_of(None, 7)] == [7]


def test_what_is_left_of_a_tile_stays_in_its_run() -> None:
    """In the order of the method: patch 3 of tile 0 fills its first placeholder."""
    tiling = Tiling(2, (1, 1), 4, tuple(range(8)), apart=True)
    raster = torch.tensor([[3, 0, -1], [2, 1, 0]])
    slots, places = in_own_runs(tiling, raster, ALL)
    assert slots.tolist() == [0, 1, 2, 4, 5, 6]
    assert places.tolist() == [3, 0, -1, 6, 5, 4]
    stays = torch.tensor([[True, False, True], [False, True, False]])
    slots, places = in_own_runs(tiling, raster, stays)
    assert slots.tolist() == [0, 2, 5]
    assert places.tolist() == [3, -1, 5]


# Two tiles of 2 x 2 patches side by side, read row by row; the last column is padding.
SIDE_BY_SIDE = Tiling(2, (1, 2), 4, (0, 1, 4, -1, 2, 3, 6, -1))


def test_tiles_side_by_side_are_put_into_the_order_of_the_prompt() -> None:
    """A merged rest comes last, and what shows nothing but padding is left out."""
    raster = torch.tensor([[3, 0, -1], [2, 1, 0]])
    chosen, places = in_prompt_order(SIDE_BY_SIDE, raster, ALL, None)
    assert chosen.tolist() == [1, 5, 0, 3, 2]
    assert places.tolist() == [0, 2, 4, 5, -1]
    stays = torch.tensor([[True, False, True], [True, True, True]])
    assert in_prompt_order(SIDE_BY_SIDE, raster, stays, None)[0].tolist() == [5, 0, 3, 2]


def test_an_order_of_the_method_s_own() -> None:
    raster = torch.tensor([[3, 0, 1], [2, 1, 0]])
    rank = torch.tensor([[4, -1, 0], [2, 3, 1]])
    chosen, places = in_prompt_order(SIDE_BY_SIDE, raster, ALL, rank)
    assert chosen.tolist() == [2, 5, 3, 4, 0]
    assert places.tolist() == [1, 2, 5, -1, 4]


def test_more_than_the_prompt_has_room_for() -> None:
    raster = torch.tensor([[-1] * 4, [-1] * 4])
    stays = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(BudgetError, match="8 tokens are left of an image that the prompt has 6"):
        in_prompt_order(SIDE_BY_SIDE, raster, stays, None)
