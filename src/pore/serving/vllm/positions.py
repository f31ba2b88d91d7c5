"""Positions on three axes of a prompt whose images are shorter than they were."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COLUMNS, _EXACT = 4, 256
"""How many columns of a row are its place: row and column in the image, each in two digits to the
base 256, because bfloat16 has no larger whole number without gaps."""


def place_columns(kept: Tensor, width: int) -> Tensor:
    """(k, 4) where the tokens of an image lie that are left, for a tensor of any precision.

    Args:
        kept: (k,) which they are, in raster order.
        width: Tokens of a row of the image.
    """
    row, column = kept // width, kept % width
    return torch.stack([row // _EXACT, row % _EXACT, column // _EXACT, column % _EXACT], 1)


def places_of(columns: Tensor) -> Tensor:
    """(3, k) frames, rows and columns, from (k, 4) of `place_columns`."""
    row, rest, column, more = columns.T.round().long()
    row, column = row * _EXACT + rest, column * _EXACT + more
    return torch.stack([torch.zeros_like(row), row, column])


def prompt_positions(length: int, images: Sequence[tuple[int, int, int]]) -> tuple[Tensor, int]:
    """The positions of a prompt, as far as the sizes of its images tell them.

    Args:
        length: Tokens of the prompt, N.
        images: Of every image in order: the first of its tokens, how many are left, and how many
            positions the whole image takes, the longer side of its grid.

    Returns:
        (3, N) positions, with the first position of an image at each of its tokens; and the first
        position after the prompt less N.
    """
    positions = torch.empty(length, dtype=torch.long)
    column = following = 0
    for offset, left, side in images:
        positions[column:offset] = torch.arange(following, following + offset - column)
        start = following + offset - column
        positions[offset : offset + left] = start
        column, following = offset + left, start + side
    positions[column:] = torch.arange(following, following + length - column)
    return positions.expand(3, -1).clone(), following + length - column - length


def with_places(
    positions: Tensor, visual: Tensor, places: Sequence[Tensor], computed: int
) -> Tensor:
    """Put places in images into the positions of a prompt.

    An image starts one position after the token before it. Nothing else of the positions is read,
    so that doing this again, after a request was preempted, changes nothing.

    Args:
        positions: (3, N) of the prompt.
        visual: (N,) bool, True at tokens of images; text is between images.
        places: (3, n) frames, rows and columns, one tensor for each image or part of an image whose
            tokens follow in this step.
        computed: Tokens before this step.

    Returns:
        (3, N) positions.
    """
    if not places:
        return positions
    found = positions.clone()
    columns = visual.nonzero()[:, 0]
    columns = columns[columns >= computed]
    taken = torch.cat(list(places), 1).to(positions)
    columns = columns[: taken.shape[1]]
    first = visual & ~torch.nn.functional.pad(visual, (1, 0))[:-1]
    number = first.cumsum(0) - 1
    starts = first.nonzero()[:, 0]
    before = torch.where(starts > 0, positions[0, (starts - 1).clamp(min=0)] + 1, 0)
    found[:, columns] = before[number[columns]] + taken
    return found
