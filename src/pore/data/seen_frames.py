"""Which parts of the frames of a video its visual tokens show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

from pore._videos import Video
from pore.data.frames import frames_of
from pore.data.prompts import build_inputs
from pore.data.samples import Sample
from pore.errors import InputError
from pore.families.registry import images_of
from pore.layout import Image


@dataclass(frozen=True)
class SeenFrame:
    """The visual tokens of a frame, or of frames that one grid of tokens shows together.

    Attributes:
        picture: The part of the frame that they show; of several frames, of the first.
        number: Which frame of the whole video it is, counted from 0.
        grid: Rows and columns of the tokens.
        image: Which image of the prompt they belong to: all to one, or frames are images.
        first: Raster index of the first of them in that image.
    """

    picture: PIL.Image.Image
    number: int
    grid: tuple[int, int]
    image: int
    first: int

    def kept(self, kept: Sequence[Sequence[int]]) -> list[int]:
        """Raster indices within the frame of what is kept.

        Args:
            kept: For every image of the prompt, raster indices of the tokens that stay.
        """
        places = (index - self.first for index in kept[self.image])
        return [place for place in places if 0 <= place < self.grid[0] * self.grid[1]]


def seen_frames(model: nn.Module, processor: Any, sample: Sample) -> list[SeenFrame]:
    """Where the visual tokens of a video lie on its frames.

    Where a processor hands frames to the model one by one, what it cuts off is found by the colours
    that come out of it, as in `coverage_of`; else frames are taken to be seen whole.

    Args:
        model: The model.
        processor: Its processor.
        sample: A question about a video.

    Returns:
        One entry for every frame, or for all frames that share their tokens.

    Raises:
        InputError: The processor refuses the video, or its tokens lie on no grid.
    """
    video = sample.load()
    if not isinstance(video, Video):
        raise InputError(f"Sample {sample.id} is not about a video.")
    inputs = build_inputs(processor, [sample])
    box = _seen(processor, sample, video, inputs)
    frames, found = len(video.frames), []
    images = images_of(model, inputs)
    for index, image in enumerate(images):
        steps = image.frames if len(images) == 1 else 1
        size = image.count // steps
        grid, skipped = _grid(image, size)
        for step in range(steps):
            which = (step if len(images) == 1 else index) * frames // (steps * len(images))
            picture = video.frames[which]
            shown = picture if box is None else picture.crop(box)
            number = video.numbers[which]
            found.append(SeenFrame(shown, number, grid, index, step * size + skipped))
    return found


def _grid(image: Image, size: int) -> tuple[tuple[int, int], int]:
    """Rows and columns of a frame of so many tokens, and how many tokens are before them."""
    if image.cells is not None and image.cells[0] * image.cells[1] == size:
        return image.cells, 0
    for skipped in (0, 1):  # a CLS token
        side = math.isqrt(size - skipped)
        if side > 0 and side**2 == size - skipped:
            return (side, side), skipped
    raise InputError(f"The {size} visual tokens of a frame lie on no grid.")


def _seen(
    processor: Any, sample: Sample, video: Video, inputs: Mapping[str, Any]
) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of what is seen of every frame; None for the whole."""
    pixels = inputs.get("pixel_values_videos")
    if pixels is None or pixels.dim() != 5:
        return None
    width, height = video.frames[0].size
    slope = PIL.Image.merge(
        "RGB",
        (
            _sloped(width, height, 0),
            _sloped(width, height, 1),
            PIL.Image.new("L", (width, height)),
        ),
    )
    views: list[list[Tensor]] = []
    for picture in (
        PIL.Image.new("RGB", (width, height), "white"),
        PIL.Image.new("RGB", (width, height), "black"),
        slope,
    ):
        same = Video((picture,) * len(video.frames), video.numbers, video.rate)
        made = build_inputs(processor, [Sample(sample.id, same, sample.question)])
        views.append([made["pixel_values_videos"][0, 0].float()])
    ((left, top, right, bottom),) = frames_of(views[0], views[1], views[2], (width, height))
    return round(left), round(top), round(right), round(bottom)


def _sloped(width: int, height: int, axis: int) -> PIL.Image.Image:
    """Grey that grows from left to right (axis 0) or from top to bottom."""
    length = (width, height)[axis]
    ramp = (255 * (torch.arange(length) + 0.5) / length).round().to(torch.uint8)
    plane = ramp[None].expand(height, width) if axis == 0 else ramp[:, None].expand(height, width)
    return PIL.Image.fromarray(plane.contiguous().numpy())
