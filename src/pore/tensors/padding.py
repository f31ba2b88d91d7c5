"""Letterbox padding: the share of every patch that it covers, and the patches that are left.

LLaVA letterboxes an image to a square: it is centred, and two bars of the mean colour fill the
rest. Bars mean nothing, but can draw attention. Version 2 of PoRe (arXiv 2508.17807v2) sets the
scores of patches that are mostly bar to zero and keeps no more tokens than there are others; to
leave them out of the choice is the same, also where a score underflows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pore.errors import InputError

THRESHOLD = 0.5
"""Share of a patch that may be padding before it is suppressed, as released for FastV."""

# Bars have the mean colour cut to whole levels of 255, which normalisation takes to within one
# level of 0: 1/255 over a standard deviation of 0.22 or more.
_BAR_TOLERANCE = 0.018


# Lines over which resizing smears the edge of a bar.
_BLUR = 4


def letterbox_padding(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of every patch that is letterbox bar, read from the pixels the vision tower gets.

    For use where the size of the original image is no longer known. A bar is a pair of equally
    wide strips at opposite edges that are of the mean colour throughout, which is 0 after
    normalisation; an image that is of the mean colour all over has none. Resizing blurs the
    inner edge of a bar, which is read from how alike the lines around it are: on random pictures
    resized to 336 pixels the shares came out within 0.06 of those that
    the image's size gives.

    Args:
        pixels: (I, 3, H, W) normalised pixel values.
        grid: Rows and columns of patches.

    Returns:
        (I, rows · columns) shares from 0 to 1 in raster order, float32, on the device of
        `pixels`.

    Raises:
        InputError: `pixels` has not four dimensions, or the grid is finer than the pixels.
    """
    if pixels.ndim != 4:
        raise InputError(f"Pixels must be (images, 3, H, W), not {tuple(pixels.shape)}.")
    pixels = pixels.float()
    top, left = _bar(pixels), _bar(pixels.transpose(2, 3))
    top, left = torch.stack([top, left]).cpu().double()  # one synchronisation
    top, left = top * (top >= left), left * (left > top)
    height, width = pixels.shape[2:]
    return covered(left, top, grid, (height, width)).to(pixels.device, torch.float32)


def visible_patches(padding: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """The patches that are not suppressed.

    An image so thin that every patch is padding beyond the threshold keeps those with the least
    of it, so that something is left to choose from; the released code would keep none.

    Args:
        padding: (..., n) shares of padding; 1 in columns that stand for no patch.
        threshold: Share above which a patch counts as padding, from 0 to 1.

    Returns:
        (..., n) bool, True in at least one place of every row.

    Raises:
        InputError: `threshold` is not from 0 to 1.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"The padding threshold must be from 0 to 1, not {threshold}.")
    visible = padding <= threshold
    least = padding == padding.amin(dim=-1, keepdim=True)
    return torch.where(visible.any(dim=-1, keepdim=True), visible, least)


def cap(counts: Tensor, padding: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Budgets lowered to the number of patches that are not padding.

    Args:
        counts: (...) numbers of tokens to keep.
        padding: (..., n) shares of padding on the same device.
        threshold: Share above which a patch counts as padding, from 0 to 1.

    Returns:
        (...) numbers of tokens, int64.

    Raises:
        InputError: `threshold` is not from 0 to 1.
    """
    return torch.minimum(counts, visible_patches(padding, threshold).sum(dim=-1))


def _bar(pixels: Tensor) -> Tensor:
    """Height of the equal bars at top and bottom, in pixels and parts of them.

    Args:
        pixels: (I, C, H, W) normalised pixel values, float32.

    Returns:
        (I,) heights, 0 where there is no pair of bars.
    """
    height = pixels.shape[2]
    plain = (pixels.abs() <= _BAR_TOLERANCE).all(dim=3).all(dim=1)
    ends = []
    for rows, lines in ((pixels, plain), (pixels.flip(2), plain.flip(1))):
        bar = lines.int().cumprod(dim=1).sum(dim=1)
        # Resizing smears the edge over the next lines. Their likeness to the first line after
        # them says how much of each is image, for the weights of a resizing filter sum to 1.
        place = (bar[:, None] + torch.arange(_BLUR + 1, device=bar.device)).clamp(max=height - 1)
        line = (
            rows.gather(2, place[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))
            .transpose(1, 2)
            .flatten(2)
        )
        inner = line[:, -1:]
        likeness = (line * inner).sum(dim=2) / (inner * inner).sum(dim=2).clamp(min=1e-6)
        smeared = (1 - likeness[:, :-1]).sum(dim=1).clamp(0, _BLUR)
        found = (bar > 0) & (bar < height)
        ends.append(torch.where(found, bar + smeared, 0.0))
    return torch.minimum(*ends)


def covered(left: Tensor, top: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Share of every patch outside the image, which lies between equal bars.

    Args:
        left: (I,) width of the left and right bars in pixels, float64.
        top: (I,) height of the top and bottom bars in pixels, float64.
        grid: Rows and columns of patches.
        size: Height and width of the padded image in pixels.

    Returns:
        (I, rows · columns) float64.
    """
    if min(grid) < 1 or grid[0] > size[0] or grid[1] > size[1]:
        raise InputError(f"A grid of {grid} does not fit an image of {size} pixels.")
    lengths = []
    for bar, cells, pixels in ((top, grid[0], size[0]), (left, grid[1], size[1])):
        patch = pixels // cells
        start = torch.arange(cells, dtype=torch.float64) * patch
        begin = torch.maximum(start, bar[:, None])
        end = torch.minimum(start + patch, pixels - bar[:, None])
        lengths.append((end - begin).clamp(min=0))
    area = math.prod(pixels // cells for cells, pixels in zip(grid, size, strict=True))
    return (1 - lengths[0][:, :, None] * lengths[1][:, None, :] / area).flatten(1)
