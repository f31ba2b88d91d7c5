"""The coverage of visual tokens: which part of a picture each of them shows.

Processors resize, crop, pad and tile pictures in ways of their own. The coverage is not computed
from their settings. Instead the processor is given a picture of the same size in which red grows
from left to right and green from top to bottom: the colours that come out say where they came from.
So this holds for any processor, whatever its settings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as pil
from torch import Tensor, nn

from pore.data.frames import frames_of
from pore.data.prompts import render
from pore.errors import InputError
from pore.families.registry import family_of, images_of
from pore.layout import Image


@dataclass(frozen=True)
class Coverage:
    """The part of a picture that each visual token of an image in a prompt shows.

    Boxes are (left, top, right, bottom) in pixels of the picture. They reach beyond it where it was
    padded, and are NaN in a view that shows nothing but padding. A *view* is what goes through the
    vision tower as one picture: a tile, a crop or the whole picture.

    Attributes:
        size: (width, height) of the picture.
        boxes: (n, 4) float64, the box of every visual token, in the order of their raster indices.
        views: (n,) the view that each token belongs to.
        frames: (V, 4) float64, the box of every view.
    """

    size: tuple[int, int]
    boxes: Tensor
    views: Tensor
    frames: Tensor

    @property
    def padding(self) -> Tensor:
        """(n,) share of every token's box that is padding by the processor; 1 without a box.

        Padding is what lies outside of the picture.
        """
        return 1 - _inside(self.boxes, self.size).nan_to_num(0)


def coverage_of(
    model: nn.Module, processor: Any, picture: pil.Image, text: str | None = None, **kwargs: Any
) -> list[Coverage]:
    """Which part of a picture every visual token shows, by asking the processor.

    The processor runs three times, on pictures of that size. Where a model blends patches into
    tokens (LLaVA-OneVision, large images), boxes are those that divide the picture evenly.

    Args:
        model: The model.
        processor: Its processor.
        picture: The picture; only its size matters.
        text: A prompt with the placeholder of one image; by default what the chat template makes of
            an image.
        kwargs: Further arguments of the processor, as in its other calls.

    Returns:
        The coverage of every image that the picture becomes in the prompt: one, except for
        processors that make separate images of crops, such as Gemma 3 with `do_pan_and_scan`.

    Raises:
        InputError: The processor refuses the picture or has no chat template, or the visual tokens
            lie on no grid.
        UnsupportedModelError: No family is known for the model.
    """
    family = family_of(model)
    prompt = render(processor, "") if text is None else text

    def views(pixels: npt.NDArray[np.uint8]) -> tuple[Any, list[Tensor]]:
        try:
            inputs = processor(
                images=[pil.fromarray(pixels)], text=[prompt], return_tensors="pt", **kwargs
            )
        except Exception as error:  # processors raise whatever their parts raise
            raise InputError(
                f"The processor refuses a picture of {picture.width} × {picture.height} pixels: "
                f"{type(error).__name__}: {error}"
            ) from error
        named = family.inputs(model, (), inputs)
        return named, family.views(model, named)

    width, height = picture.size
    shape = (height, width, 3)
    inputs, white = views(np.full(shape, 255, dtype=np.uint8))
    _, black = views(np.zeros(shape, dtype=np.uint8))
    slope = np.zeros(shape, dtype=np.uint8)
    slope[..., 0] = (255 * (np.arange(width) + 0.5) / width).round()
    slope[..., 1] = (255 * (np.arange(height) + 0.5) / height).round()[:, None]
    _, sloped = views(slope)

    frames = torch.tensor(frames_of(white, black, sloped, picture.size), dtype=torch.float64)
    found, first = [], 0
    for image in images_of(model, inputs):
        of, cells, (rows, columns), count = _places(image, family.grid(model))
        if first + count > len(frames):
            break
        own = frames[first : first + count]
        high, wide = white[first].shape[-2:]
        first += count
        # Towers leave out the rest at the right and the bottom that is narrower than a patch.
        share = torch.tensor([wide // columns / wide, high // rows / high] * 2, dtype=own.dtype)
        start, end = own[of][:, [0, 1, 0, 1]], own[of][:, [2, 3, 2, 3]]
        found.append(Coverage(picture.size, start + cells * share * (end - start), of, own))
    if first != len(frames) or not found:
        raise InputError(
            f"The processor makes {len(frames)} views of a picture, but the prompt has visual "
            f"tokens for {first}; pass the model's own processor and a prompt with one image."
        )
    return found


def _places(
    image: Image, grid: tuple[int, int] | None
) -> tuple[Tensor, Tensor, tuple[int, int], int]:
    """Where the visual tokens of an image lie in its views.

    Returns:
        views (n,); boxes (n, 4) in cells of the view, a cell being a token wide and high; the rows
        and columns of cells; and the number of views.
    """
    tiling = image.tiling
    if tiling is not None and tiling.tiles > 1:
        side = math.isqrt(tiling.patches)
        slots = torch.tensor(tiling.shown, dtype=torch.long)
        patch = slots % tiling.patches - (tiling.patches - side * side)  # a CLS token comes first
        if (patch < 0).any():
            raise InputError("The CLS token is among the visual tokens, so they lie on no grid.")
        views, cell, count, grid = slots // tiling.patches, patch, tiling.tiles, (side, side)
    else:
        grid = image.grid or grid
        number = torch.arange(len(image.columns))
        if grid is None or len(number) % (grid[0] * grid[1]):
            raise InputError("The visual tokens of this image lie on no grid.")
        size = grid[0] * grid[1]
        views, cell, count = number // size, number % size, len(number) // size
    row, column = cell // grid[1], cell % grid[1]
    boxes = torch.stack([column, row, column + 1, row + 1], -1).double()
    if tiling is not None and tiling.blended and tiling.grid is not None:
        ends = torch.tensor(tiling.slots) < 0
        _spread(boxes, views, int(ends.sum()), tiling.grid, grid[0])
    return views, boxes, grid, count


def _spread(boxes: Tensor, views: Tensor, rows: int, grid: tuple[int, int], side: int) -> None:
    """Give tokens that are blended from patches of the tiles even boxes, in place.

    Args:
        boxes: (n, 4) the patches nearest to the tokens, in patches of their view.
        views: (n,) their views; tokens of the first are patches.
        rows: How many rows the tokens of the tiles are.
        grid: Rows and columns of tiles.
        side: Patches along a side of a tile.
    """
    tiles = views > 0
    tile = views[tiles] - 1
    corner = torch.stack([tile % grid[1], tile // grid[1]], -1).double() * side
    centres = (boxes[tiles, :2] + 0.5 + corner).view(rows, -1, 2)
    x, y = _even(centres[0, :, 0]), _even(centres[:, 0, 1])
    top, left = torch.meshgrid(y[:-1], x[:-1], indexing="ij")
    bottom, right = torch.meshgrid(y[1:], x[1:], indexing="ij")
    even = torch.stack([left, top, right, bottom], -1).view(-1, 4)
    boxes[tiles] = even - corner.repeat(1, 2)


def _even(centres: Tensor) -> Tensor:
    """(n + 1,) the edges of n cells of one size that have about these centres."""
    count = len(centres)
    step = (centres[-1] - centres[0]) / max(count - 1, 1) if count > 1 else centres.new_ones(())
    return (centres[0] + centres[-1] - count * step) / 2 + torch.arange(count + 1) * step


def _inside(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(n,) share of every box that lies in the picture."""
    low, high = boxes[:, :2], boxes[:, 2:]
    edge = torch.tensor(size, dtype=boxes.dtype)
    inner = torch.minimum(high, edge) - low.clamp(min=0)
    return (inner.clamp(min=0) / (high - low)).prod(-1)
