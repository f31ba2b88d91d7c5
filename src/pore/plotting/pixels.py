"""Pictures for pages, without a figure around them: what is said of them is text of the page."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from pore.plotting.kept import Panel, averaged, dimmed, kept_mask, pixels_of

if TYPE_CHECKING:
    import numpy.typing as npt
    from PIL.Image import Image

# The shorter side that a small picture is enlarged to, and the longer one a large is reduced to.
_LEAST, _MOST = 288, 560

# A PNG of at most so many bytes; a photograph is larger, and becomes a JPEG.
_SMALL = 60_000

_EDGE = (0, 114, 178)


def kept_picture(
    image: Image | npt.NDArray[np.uint8], panel: Panel, grid: tuple[int, int]
) -> tuple[bytes, str]:
    """What a method keeps of an image, as a picture alone.

    Args:
        image: The image as the model sees it.
        panel: What is kept.
        grid: Rows and columns of the visual tokens.

    Returns:
        A PNG or JPEG, and how many tokens are left, in words.

    Raises:
        InputError: An index lies outside the grid, there is no image, or a coarse grid has more
            cells than the image has pixels.
    """
    pixels = _sized(pixels_of(image))
    if panel.cells is not None:
        said = f"averaged to {panel.cells[0]}×{panel.cells[1]}"
        return _encoded(averaged(pixels, panel.cells)), said
    mask = kept_mask(panel.kept, grid)
    said = f"{mask.sum()} of {mask.size} tokens"
    if panel.extra:
        said += f", {panel.extra} of no one patch"
    return _encoded(_edged(dimmed(pixels, mask), mask)), said


def to_web(image: Image | npt.NDArray[np.uint8]) -> bytes:
    """An image as a PNG or JPEG of a size for a page."""
    return _encoded(_sized(pixels_of(image)))


def enlarged(colors: npt.NDArray[np.uint8]) -> bytes:
    """A small map of colours (rows, columns, 3) as a PNG with a square for every entry."""
    return _encoded(_sized(colors))


def _sized(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Small pictures with every pixel repeated, and large ones reduced."""
    height, width = pixels.shape[:2]
    if max(height, width) > _MOST:
        from PIL import Image

        image = Image.fromarray(np.ascontiguousarray(pixels))
        image.thumbnail((_MOST, _MOST))
        reduced: npt.NDArray[np.uint8] = np.asarray(image)
        return reduced
    times = max(1, min(-(-_LEAST // min(height, width)), 4 * _MOST // max(height, width)))
    larger: npt.NDArray[np.uint8] = pixels.repeat(times, 0).repeat(times, 1)
    return larger


def _edged(pixels: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Lines around the kept tokens, two pixels wide."""
    rows = np.arange(pixels.shape[0]) * mask.shape[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * mask.shape[1] // pixels.shape[1]
    kept = np.pad(mask[rows[:, None], columns[None]], 1, mode="edge")
    inner = kept[1:-1, 1:-1]
    across = (kept[:-2, 1:-1] != inner) | (kept[2:, 1:-1] != inner)
    down = (kept[1:-1, :-2] != inner) | (kept[1:-1, 2:] != inner)
    edged: npt.NDArray[np.uint8] = pixels.copy()
    edged[across | down] = _EDGE
    return edged


def _encoded(pixels: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    if file.tell() > _SMALL:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=85)
    return file.getvalue()
