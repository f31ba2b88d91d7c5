"""Where things lie, as methods ask for it."""

from __future__ import annotations

from dataclasses import replace

import torch

from pore.layout import Image, Layout, Tiling
from pore.tensors.gathering import pack


def test_text_after_every_image() -> None:
    """Text after the image itself, on either side of padding, and no other image's tokens."""
    tokens = torch.ones(2, 10, dtype=torch.bool)
    tokens[1, :2] = tokens[1, 9] = False
    images = [
        Image(0, 0, [1, 2]),
        Image(0, 1, [4, 5, 7], structure=[6, 8]),
        Image(1, 0, [3]),
    ]
    layout = Layout.of(images, tokens)
    text = [[0, 3, 9], [2, 4, 5, 6, 7, 8]]
    assert [row.nonzero().flatten().tolist() for row in layout.text] == text
    after = [row.nonzero().flatten().tolist() for row in layout.text_after]
    assert after == [[3, 9], [9], [4, 5, 6, 7, 8]]

    keep = torch.tensor([[True, False, False], [False, False, True], [True, False, False]])
    index, left = pack(layout.kept_tokens(keep), right=False)
    short = layout.shorten(keep, index, left)
    assert index[0].tolist() == [0, 1, 3, 6, 7, 8, 9]
    assert short.text[0].nonzero().flatten().tolist() == [0, 2, 6]
    after = [row.nonzero().flatten().tolist() for row in short.text_after]
    assert after[:2] == [[2, 6], [6]]
    assert index[1, after[2]].tolist() == [4, 5, 6, 7, 8]


def test_which_patch_of_which_tile_a_token_shows() -> None:
    """Padding cut off, ends of rows between, an image in one piece beside, and a merged token."""
    tiling = Tiling(3, (1, 2), 4, (0, 1, 2, 3, 4, 6, -1, 9, 11, -1))
    images = [tiling.image(0, 0, range(1, 11)), Image(1, 0, [2, 3, 4])]
    layout = Layout.of(images, torch.ones(2, 12, dtype=torch.bool))
    tile, patch = layout.shows()
    assert tile[0].tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert patch[0].tolist() == [0, 1, 2, 3, 0, 2, 1, 3]
    assert tile[1].tolist() == [0] * 8
    assert patch[1, :3].tolist() == [0, 1, 2]
    tile, patch = replace(layout, raster=layout.raster.clone().fill_(-1)).shows()
    assert (tile == 0).all()
    assert (patch == -1).all()
