"""Finding the images of a prompt: helpers for `Family.still_images`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal

from torch import Tensor

from pore.errors import InputError
from pore.layout import Image, Tiling


def comes_with(inputs: Mapping[str, Any], kind: Literal["image", "video"]) -> bool:
    """Whether images or videos come with a forward: as pixels, or as features made before it.

    A placeholder without either is a token that the model itself generated.

    Args:
        inputs: The arguments of the multimodal forward, by name.
        kind: Which of the two.
    """
    pixels = "pixel_values" if kind == "image" else "pixel_values_videos"
    features = inputs.get("mm_encoder_outputs") or {}
    return inputs.get(pixels) is not None or features.get(kind) is not None


# What says how large images or videos are; a family needs one of them, if their sizes differ.
_SIZES = {
    "image": ("image_sizes", "image_grid_thw", "image_position_ids"),
    "video": ("video_grid_thw", "video_position_ids"),
}


def check_sizes(inputs: Mapping[str, Any], kind: Literal["image", "video"]) -> None:
    """Refuse features that are given in place of pixels without the sizes of what they are of.

    Args:
        inputs: As in `comes_with`.
        kind: Likewise.

    Raises:
        InputError: There are no pixels, and no sizes.
    """
    pixels = "pixel_values" if kind == "image" else "pixel_values_videos"
    if all(inputs.get(name) is None for name in (pixels, *_SIZES[kind])):
        raise InputError(
            f"Features of {kind}s were given in place of pixels, without the sizes of the {kind}s, "
            "which say where their tokens are; `generate` leaves sizes out. Give it the pixels, or "
            "call the model itself with the features and all that came with the pixels."
        )


def by_place(images: Sequence[Image]) -> list[Image]:
    """Images and videos of a batch, sorted by sample and then by place, and numbered in that order.

    Args:
        images: The images, in any order.
    """
    ordered = sorted(images, key=lambda image: (image.row, image.columns[0]))
    rows = [image.row for image in ordered]
    return [replace(one, index=i - rows.index(one.row)) for i, one in enumerate(ordered)]


def encoded_images(columns: Sequence[Sequence[int]], tilings: Sequence[Tiling]) -> list[Image]:
    """Cut the placeholder columns of every sample into the images that were encoded.

    Args:
        columns: For each sample, the ascending columns of its visual tokens.
        tilings: The tilings of the encoded images, in the order of the prompts. If samples are
            repeated for beam search, they hold each image once.

    Returns:
        The images.

    Raises:
        InputError: A sample's visual tokens are not those of its images.
    """
    tokens = sum(len(tiling.slots) for tiling in tilings)
    copies = max(sum(map(len, columns)) // max(tokens, 1), 1)
    left, images = list(tilings), []
    mine: list[Tiling] = []
    for row, where in enumerate(columns):
        if row % copies == 0:
            mine = []
            count = len(where)
            while count > 0 and left:
                mine.append(left.pop(0))
                count -= len(mine[-1].slots)
            if count:
                other = "more" if count > 0 else "fewer"
                raise InputError(
                    f"Sample {row} has {abs(count)} visual tokens {other} than its "
                    "images come to; build the inputs with the model's own processor."
                )
        for index, tiling in enumerate(mine):
            images.append(tiling.image(row, index, where[: len(tiling.slots)]))
            where = where[len(tiling.slots) :]
    return images


def tiled_image(row: int, index: int, columns: Sequence[int], grid: tuple[int, int]) -> Image:
    """An image of one tile or several of one size; what stands between its tokens is structure.

    Args:
        row: Its sample.
        index: Which image of that it is.
        columns: The ascending columns of its visual tokens.
        grid: (height, width) of a tile in tokens.

    Raises:
        InputError: The tokens do not make whole tiles.
    """
    size = grid[0] * grid[1]
    if len(columns) % size:
        raise InputError(
            f"Image {index} of sample {row} has {len(columns)} visual tokens, not a whole number "
            f"of tiles of {size}; build the inputs with the model's own processor."
        )
    between = sorted({*range(columns[0], columns[-1] + 1)} - set(columns))
    one = grid if len(columns) == size else None
    return Image(row, index, columns, one, structure=between)


def tiles_apart(image: Image, size: int, grid: tuple[int, int] | None) -> Tiling:
    """The tiling of an image whose tiles follow one another in the prompt, the whole image last.

    Args:
        image: The image.
        size: Visual tokens of a tile.
        grid: (rows, columns) of the other tiles; of one tile alone, of its tokens; or None.
    """
    tiles = len(image.columns) // size
    return Tiling(tiles, grid, size, tuple(range(tiles * size)), whole=tiles - 1, apart=True)


def placeholder_runs(input_ids: Tensor, token_id: int) -> list[list[int]]:
    """The columns of a placeholder token, for each sample.

    Args:
        input_ids: (B, L) token ids.
        token_id: The placeholder.

    Returns:
        B lists of ascending columns.
    """
    found = (input_ids == token_id).cpu()
    return [row.nonzero().flatten().tolist() for row in found]


def unbroken(columns: Sequence[int]) -> list[list[int]]:
    """Cut ascending columns into runs without gaps.

    Args:
        columns: Columns of one sample.

    Returns:
        The runs, in order.
    """
    runs = groupby(enumerate(columns), lambda pair: pair[1] - pair[0])
    return [[column for _, column in pairs] for _, pairs in runs]


def whole_tiles(row: int, columns: Sequence[int], size: int) -> list[Sequence[int]]:
    """Cut the placeholder columns of a sample into tiles of one size, each of them unbroken.

    Args:
        row: Which sample it is.
        columns: The ascending columns of its visual tokens.
        size: Visual tokens of a tile.

    Returns:
        The columns of every tile.

    Raises:
        InputError: They do not make whole tiles.
    """
    tiles = [columns[start : start + size] for start in range(0, len(columns), size)]
    if any(tile[-1] - tile[0] != size - 1 for tile in tiles) or len(columns) % size:
        raise InputError(
            f"Sample {row} has {len(columns)} visual tokens, not a whole number of tiles of "
            f"{size}; build the inputs with the model's own processor."
        )
    return tiles


def equal_images(
    columns: Sequence[Sequence[int]], size: int, grid: tuple[int, int] | None
) -> list[Image]:
    """Cut the placeholder columns of every sample into images of one size.

    Args:
        columns: For each sample, the ascending columns of its visual tokens.
        size: Visual tokens of one image.
        grid: (height, width) of one image in tokens, or None.

    Returns:
        The images.

    Raises:
        InputError: A sample's visual tokens do not make a whole number of images.
    """
    images = []
    for row, where in enumerate(columns):
        if len(where) % size:
            raise InputError(
                f"Sample {row} has {len(where)} visual tokens, not a whole number of images of "
                f"{size}; build the inputs with the model's own processor."
            )
        for index in range(len(where) // size):
            images.append(Image(row, index, where[index * size : (index + 1) * size], grid))
    return images
