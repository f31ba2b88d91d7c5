"""Pictures of any origin, as a viewer shows them.

Pillow alone would clip pictures with more than 256 levels, drop transparency without a background,
leave a picture on its side, and start other programs for some formats.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from pore._files import open_regular
from pore.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    import PIL.Image


FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are opened. Pillow decodes these itself. For others, such as PostScript, it
starts programs, which run whatever the file says."""

MAX_ASPECT = 256
"""The longer side of a picture is at most this many times the shorter one. A processor that makes
the shorter side 336 pixels already makes 29 million pixels of such a picture."""

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF's numbers


def open_image(
    source: PIL.Image.Image | Path | str | bytes, *, most: int | None = None
) -> PIL.Image.Image:
    """A picture in RGB as a viewer shows it.

    - It is turned upright by its EXIF data.
    - An animation gives its first picture.
    - Transparent parts become white.
    - Grey of 16 bits (modes I;16 and I): 0 is black and 65535 white, or what a TIFF says.
    - Grey of floats (mode F): 0 is black and 1 white, or 255 white if some pixel is above 2.
    - Grey outside of its range: the smallest value is black and the largest white.
    - CMYK is converted without a colour profile, and profiles of RGB are not applied.

    Args:
        source: The picture, its file, or its encoded bytes in one of the `FORMATS`.
        most: The largest number of pixels, found before they are decoded; None leaves it to Pillow.

    Returns:
        The picture: a copy, completely read.

    Raises:
        InputError: It is in none of these formats, has more pixels than `most` or Pillow's limit
            against decompression bombs, is more than `MAX_ASPECT` times as long as wide, or has
            pixels of NaN or infinity.
        Exception: Whatever else decoders of damaged files raise.
    """
    import PIL.Image

    if isinstance(source, PIL.Image.Image):
        return _shown(source, most)
    with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
        PIL.Image.init()
        known = [name for name in FORMATS if name in PIL.Image.OPEN]
        try:
            with PIL.Image.open(file, formats=known) as image:
                return _shown(image, most)
        except PIL.UnidentifiedImageError as error:
            raise InputError(f"it is damaged, or not one of {', '.join(known)}.") from error
        except PIL.Image.DecompressionBombError as error:
            raise InputError(
                f"it has more than {2 * (PIL.Image.MAX_IMAGE_PIXELS or 0)} pixels; make it "
                "smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it."
            ) from error


def _shown(image: PIL.Image.Image, most: int | None) -> PIL.Image.Image:
    """An opened picture in RGB, see `open_image`."""
    import PIL.Image
    import PIL.ImageOps

    width, height = image.size
    if most is not None and width * height > most:
        raise InputError(f"it has {width} × {height} pixels, more than {most}; make it smaller.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(
            f"it has {width} × {height} pixels, more than {MAX_ASPECT} times as long as wide, "
            "which processors may blow up to gigabytes; cut it."
        )
    tags: Any = getattr(image, "tag_v2", {})  # of a TIFF
    upright = PIL.ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        return _grey(upright, tags).convert("RGB")
    if upright.mode == "La":  # premultiplied; Pillow converts it only to LA
        upright = upright.convert("LA")
    if (
        upright.mode in ("LA", "PA", "RGBA", "RGBa")
        or ("transparency" in upright.info and upright.mode in ("1", "L", "P", "RGB"))
        or (upright.mode == "P" and getattr(upright.palette, "mode", "") == "RGBA")
    ):
        white = PIL.Image.new("RGBA", upright.size, "white")
        upright = PIL.Image.alpha_composite(white, upright.convert("RGBA"))
    return upright.convert("RGB")


def _grey(image: PIL.Image.Image, tags: Any) -> PIL.Image.Image:
    """Grey of more than 256 levels, as 256 levels."""
    import PIL.Image

    pixels = np.asarray(image).astype(np.float64)
    low, high = float(pixels.min()), float(pixels.max())
    if not np.isfinite(low + high):
        raise InputError("some of its pixels are NaN or infinity.")
    whole = image.mode.startswith("I;16")
    if image.mode == "F":
        white, most = (1.0, 2.0) if high <= 2 else (255.0, 255.0)
    else:
        white = most = 2.0 ** (tags.get(_BITS_PER_SAMPLE, (16,))[0] if whole else 16) - 1
    clear = pixels == image.info.get("transparency", -1) if whole else None
    black, white = (0.0, white) if low >= 0 and high <= most else (low, high)
    if white > black:
        pixels = (pixels - black) * (255 / (white - black))
    if whole and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts those of fewer bits
        pixels = 255 - pixels
    if clear is not None:
        pixels[clear] = 255
    return PIL.Image.fromarray(np.rint(pixels.clip(0, 255)).astype(np.uint8))
