"""The coverage of visual tokens: which part of a picture each of them shows.

Processors resize, crop, pad and tile pictures in ways of their own. The coverage is not computed
from their settings. Instead the processor is given a picture of the same size in which red grows
from left to right and green from top to bottom: the colours that come out say where they came from.
So this holds for any processor, whatever its settings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as pil
from torch import Tensor, nn

from pore.data.prompts import render
from pore.errors import InputError
from pore.families.registry import family_of
from pore.layout import Image

# From this share of the picture (of the purest pixel's) on, a pixel is not blended with padding.
_PURE = 0.99

# A view of which no pixel has a larger share of the picture shows nothing of it.
_NONE = 0.02

# So near to the edge of a picture, in pixels before and after resizing, resizing bends the slope.
_BENT = 3

# Fewer lines of pixels than this do not tell the scale.
_FEW = 4


@dataclass(frozen=True)
class Coverage:
    """What the visual tokens of one image in a prompt show of the picture it was made from.

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
        """(n,) share of every token's box that is padding of the processor; 1 where it has no box.

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
        kwargs: Further arguments of the processor, those with which it is called otherwise.

    Returns:
        The coverage of every image that the picture becomes in the prompt: one, but for processors
        that give crops as images of their own, as Gemma 3 with `do_pan_and_scan`.

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

    frames = torch.tensor(_frames(white, black, sloped, picture.size), dtype=torch.float64)
    found, first = [], 0
    for image in family.images(model, inputs):
        of, cells, (rows, columns), count = _places(image, family.grid(model))
        if first + count > len(frames):
            break
        own = frames[first : first + count]
        high, wide = white[first].shape[-2:]
        first += count
        # Towers leave out what is left over at the right and the bottom, where patches do not fit.
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


def _frames(
    white: Sequence[Tensor],
    black: Sequence[Tensor],
    sloped: Sequence[Tensor],
    size: tuple[int, int],
) -> list[list[float]]:
    """The part of a picture that every view shows.

    Args:
        white: What a white picture gives, views (3, H, W).
        black: What a black one gives.
        sloped: What one gives whose red goes from left to right and whose green from top to bottom.
        size: (width, height) of the pictures.

    Returns:
        (left, top, right, bottom) for every view.
    """
    # Padding is the same in white and black. Channels differ by what they are normalised with.
    spans = [light - dark for light, dark in zip(white, black, strict=True)]
    full = torch.stack([span.amax((1, 2)) for span in spans]).amax(0).double().numpy()
    frames = []
    for span, dark, slope in zip(spans, black, sloped, strict=True):
        # Resizing works on rows and columns one after the other, so that one of either tells all.
        # The middle is away from where padding, blended with the picture, bends a slope.
        row, column = _middle(span[0].sum(1)), _middle(span[1].sum(0))
        across = [view[0, row].double().numpy() for view in (span, dark, slope)]
        down = [view[1, :, column].double().numpy() for view in (span, dark, slope)]
        shares = [across[0] / full[0], down[0] / full[1]]
        peak = float(shares[0].max())
        if peak < _NONE:
            frames.append([math.nan] * 4)
            continue
        lines = [int((share > 0.5 * peak).sum()) for share in shares]
        edges = []
        for axis, (own, none, values) in enumerate((across, down)):
            pure = shares[axis] > _PURE * shares[axis].max()
            place = size[axis] * np.where(pure, (values - none) / np.where(pure, own, 1), 0)
            # A picture thinner than a pixel has no pure one, because of its thinner side.
            thin = lines[axis] < lines[1 - axis]
            share = shares[axis] if thin else shares[axis] / peak
            edges.append(_edges(place, pure, share, size[axis]))
        (left, right), (top, bottom) = edges
        frames.append([left, top, right, bottom])
    return frames


def _middle(sums: Tensor) -> int:
    """The middle one of the lines of pixels that hold the most."""
    most = (sums > 0.9 * sums.max()).nonzero()
    return int(most[len(most) // 2])


def _edges(
    place: npt.NDArray[np.float64],
    pure: npt.NDArray[np.bool_],
    share: npt.NDArray[np.float64],
    length: int,
) -> tuple[float, float]:
    """Which stretch of a side of a picture a view shows.

    Args:
        place: (n,) where on the side each line of pixels of the view comes from.
        pure: (n,) of which lines that is known.
        share: (n,) how much of every line is picture.
        length: The length of the side, in pixels.

    Returns:
        Where the first line begins and the last one ends.
    """
    count = len(place)
    line = np.arange(count) + 0.5

    def fitted(chosen: npt.NDArray[np.bool_]) -> tuple[float, float] | None:
        if chosen.sum() < _FEW or np.ptp(place[chosen]) < 1e-6:
            return None
        slope, start = np.polyfit(line[chosen], place[chosen], 1)
        return float(slope), float(start)

    fit = fitted(pure)
    if length == 1 or fit is None:
        # All that there is of the picture in this view is the whole of the side.
        lines = float(share.sum())
        begin = float((share * line).sum()) / lines - lines / 2
        scale = length / lines
        return -begin * scale, (count - begin) * scale
    margin = _BENT * max(1.0, fit[0])
    inner = fitted(pure & (place >= margin) & (place <= length - margin))
    slope, start = inner or fit
    end = start + slope * count
    # Colours have 256 levels, so that edges are known to a part of a level.
    known = length / 1000 + 0.05
    start = 0.0 if abs(start) < known else start
    end = float(length) if abs(end - length) < known else end
    return start, end


def _inside(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(n,) share of every box that lies in the picture."""
    low, high = boxes[:, :2], boxes[:, 2:]
    edge = torch.tensor(size, dtype=boxes.dtype)
    inner = torch.minimum(high, edge) - low.clamp(min=0)
    return (inner.clamp(min=0) / (high - low)).prod(-1)
