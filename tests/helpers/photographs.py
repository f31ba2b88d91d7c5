"""One photograph in real sizes, and marks painted on it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

SIZES: dict[str, tuple[int, int]] = {
    "photograph": (512, 600),
    "portrait": (480, 1040),
    "panorama": (1900, 400),
    "tiny": (24, 17),
    "one pixel high": (250, 1),
    "one pixel wide": (1, 150),
    "one pixel": (1, 1),
    "4K": (3840, 2160),
}
"""(width, height) of the pictures, all made from one photograph."""


@cache
def photograph(name: str) -> Image.Image:
    """A picture of one of the `SIZES`: the photograph cropped to its shape, and resized.

    It is matplotlib's photograph of Grace Hopper, 512 by 600 pixels; the panorama is three of them
    side by side.
    """
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    with Image.open(path) as file:
        whole = file.convert("RGB")
    width, height = SIZES[name]
    if width > 2 * height:
        tiled = Image.new("RGB", (3 * whole.width, whole.height))
        for i in range(3):
            tiled.paste(whole, (i * whole.width, 0))
        whole = tiled
    share = min(whole.width / width, whole.height / height)
    crop = (max(round(width * share), 1), max(round(height * share), 1))
    left, top = (whole.width - crop[0]) // 2, (whole.height - crop[1]) // 4
    box = (left, top, left + crop[0], top + crop[1])
    return whole.crop(box).resize((width, height), Image.Resampling.BICUBIC)


def marked(picture: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """The picture with its colours inverted in a box (left, top, right, bottom) of shares."""
    pixels = np.asarray(picture).copy()
    left, top, right, bottom = in_pixels(picture, box)
    pixels[top:bottom, left:right] = 255 * (pixels[top:bottom, left:right] < 128)
    return Image.fromarray(pixels)


def in_pixels(
    picture: Image.Image, box: tuple[float, float, float, float]
) -> tuple[int, int, int, int]:
    """A box of shares in whole pixels of a picture, at least one each way."""
    width, height = picture.size
    left, top = int(box[0] * width), int(box[1] * height)
    right, bottom = max(round(box[2] * width), left + 1), max(round(box[3] * height), top + 1)
    return left, top, right, bottom
