"""Letterbox padding computed from an image's size; pore reads it from the pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from pore.tensors.padding import covered


def padding_fraction(sizes: Tensor, grid: tuple[int, int], resolution: int) -> Tensor:
    """Share of every patch that letterboxing to a square has filled.

    Args:
        sizes: (I, 2) width and height of the images in pixels, before letterboxing.
        grid: Rows and columns of patches.
        resolution: Side of the square that the vision tower sees, in pixels. Patches measure
            resolution // rows by resolution // columns from the top left corner; the remainder
            belongs to no patch.

    Returns:
        (I, rows · columns) shares from 0 to 1 in raster order, float64, on the CPU.
    """
    width, height = sizes.to("cpu", torch.float64).unbind(1)
    side = torch.maximum(width, height)
    # In the order of the released code, so that shares at the threshold agree.
    left = (height - width).clamp(min=0) / (2 * side) * resolution
    top = (width - height).clamp(min=0) / (2 * side) * resolution
    return covered(left, top, grid, (resolution, resolution))


def unpadded_cells(sizes: Tensor, grid: tuple[int, int]) -> Tensor:
    """The cells of a grid that LLaVA's "unpad" leaves: letterboxing undone on the grid itself.

    It is coarser than `padding_fraction`: the image is scaled to the grid and rounded down to whole
    cells, and the same number is cut on either side. Version 2 uses it for its unweighted baseline.

    Args:
        sizes: (I, 2) width and height of the images in pixels, before letterboxing.
        grid: Rows and columns.

    Returns:
        (I, rows · columns) bool in raster order, on the CPU.
    """
    width, height = sizes.to("cpu", torch.float64).unbind(1)
    rows, columns = grid
    wide = width / height > columns / rows
    image_rows = torch.where(wide, (height * (columns / width)).floor(), float(rows))
    image_columns = torch.where(wide, float(columns), (width * (rows / height)).floor())
    cut_rows = ((rows - image_rows) / 2).floor()[:, None]
    cut_columns = ((columns - image_columns) / 2).floor()[:, None]
    row, column = torch.arange(rows), torch.arange(columns)
    in_rows = (row >= cut_rows) & (row < rows - cut_rows)
    in_columns = (column >= cut_columns) & (column < columns - cut_columns)
    return (in_rows[:, :, None] & in_columns[:, None, :]).flatten(1)
