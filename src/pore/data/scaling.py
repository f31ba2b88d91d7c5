"""Pictures scaled down, or cut into fewer tiles, so that they become fewer visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import PIL.Image

from pore.data.prompts import Resize, build_inputs
from pore.data.samples import Sample
from pore.errors import BudgetError, InputError
from pore.families.registry import family_of, images_of

if TYPE_CHECKING:
    from torch import nn

_STEP = 2**0.5
"""How much smaller the next picture is that is tried."""
_LEAST = 8
"""Pixels of the shorter side below which no picture is tried."""
_HALVINGS = 7
"""How often the gap is halved between a picture that is small enough and the next larger one."""

_SOFT_TOKENS = (70, 140, 280, 560, 1120)
"""The numbers of tokens that Gemma 4 knows."""


def settings_for(model: nn.Module, processor: Any, keep: int | float) -> Mapping[str, Any]:
    """The processor's own setting under which no picture becomes more than `keep` tokens.

    Some processors bring every picture to a size of their choice, so that scaling it changes
    nothing: those of InternVL and Aya Vision cut it into as many tiles as they may, those of
    Idefics3 and SmolVLM scale it up first, and Gemma 4's fills a number of tokens.

    Args:
        model: The model.
        processor: Its processor.
        keep: The most tokens of an image.

    Returns:
        Arguments of the processor; empty where the size of a picture decides.

    Raises:
        BudgetError: `keep` is a share, which such a setting cannot give, or less than the least.
    """
    options = list(_options(model, processor.image_processor))
    if not options:
        return {}
    if isinstance(keep, float):
        raise BudgetError(
            "This processor brings every picture to a size of its own, by one setting for all, so "
            "that no image can have a share of its own tokens; ask for a number of tokens."
        )
    fitting = [settings for count, settings in options if count <= keep]
    if not fitting:
        least = min(count for count, _ in options)
        raise BudgetError(
            f"The processor makes up to {least} visual tokens of a picture at its least setting, "
            f"which is more than {keep}; ask for more."
        )
    return fitting[-1]


def _options(model: nn.Module, pictures: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The settings of an image processor and the most tokens that each gives, rising."""
    grid = family_of(model).grid(model)
    if hasattr(pictures, "max_soft_tokens"):
        for count in _SOFT_TOKENS:
            if count <= pictures.max_soft_tokens:
                yield count, {"max_soft_tokens": count}
    elif grid is not None and hasattr(pictures, "min_patches") and pictures.max_patches:
        for tiles in range(1, pictures.max_patches + 1):
            least = min(pictures.min_patches, tiles)
            whole = tiles > 1  # beside several tiles, the whole picture at low resolution
            count = (tiles + whole) * grid[0] * grid[1]
            yield count, {"max_patches": tiles, "min_patches": least}
    elif grid is not None and getattr(pictures, "do_image_splitting", False):
        side = pictures.max_image_size["longest_edge"]
        for tiles in range(1, pictures.size["longest_edge"] // side + 1):
            count = (tiles**2 + (tiles > 1)) * grid[0] * grid[1]
            yield count, {"size": {"longest_edge": tiles * side}}


def tokens_of(
    model: nn.Module,
    processor: Any,
    size: tuple[int, int],
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> int | None:
    """How many visual tokens a model makes of a picture.

    Args:
        model: The model.
        processor: Its processor.
        size: (width, height) of the picture.
        settings: Arguments of the processor.

    Returns:
        The number; None where the processor refuses such a picture.
    """
    blank = Sample("a picture", PIL.Image.new("RGB", size), "")
    try:
        inputs = build_inputs(processor, [blank], resize=Resize(None, settings))
    except InputError:
        return None
    return sum(image.count for image in images_of(model, inputs))


def size_for(
    tokens: Callable[[tuple[int, int]], int | None], size: tuple[int, int], keep: int
) -> tuple[int, int]:
    """The largest size of the same shape of which there are at most `keep` tokens.

    Sizes are tried from the given one down, each smaller by a factor of √2, and then between the
    best of them and the next larger one. Where the number of tokens does not grow with the size, as
    with some tiles, a size in between may have been nearer.

    Args:
        tokens: Gives the number of tokens of a size, None where there is none.
        size: (width, height) of the picture.
        keep: The most that there may be.

    Returns:
        That size, at most the given one.

    Raises:
        BudgetError: None of these sizes has so few; the message names the least.
        InputError: The picture itself is refused.
    """
    whole = tokens(size)
    if whole is None:
        raise InputError(f"The processor refuses pictures of {size[0]} x {size[1]} pixels.")
    if whole <= keep:
        return size
    above, found = 1.0, []
    scale = 1 / _STEP
    least = whole
    while min(_scaled(size, scale)) >= _LEAST:
        count = tokens(_scaled(size, scale))
        if count is not None:
            least = min(least, count)
            if count <= keep:
                found.append((count, scale, above))
                if count < keep / 4:
                    break  # smaller ones have no more
            else:
                above = scale
        scale /= _STEP
    if not found:
        raise BudgetError(
            f"The processor makes at least {least} visual tokens of a picture of {size[0]} x "
            f"{size[1]} pixels, however small it is scaled, which is more than {keep}; ask for "
            "more, or use Downsample."
        )
    best, low, high = max(found, key=lambda one: one[:2])
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        count = tokens(_scaled(size, middle))
        if count is not None and best <= count <= keep:
            best, low = count, middle
        else:
            high = middle
    return _scaled(size, low)


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    width, height = size
    return max(round(width * scale), 1), max(round(height * scale), 1)
