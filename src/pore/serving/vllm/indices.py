"""Which tokens of its images a request keeps: what a client sends, and a server checks.

    {"mm_processor_kwargs": {"pore_kept": [{"grid": [24, 36], "kept": [0, 5, 17]}]}}

One entry for each image; null keeps all of it. The grid, (height, width) in visual tokens, is that
of the image where it was ranked, so that a server that scales images otherwise notices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pore.engine.embeddings import KeptEmbeddings
from pore.errors import InputError, UnsupportedModelError

KEY = "pore_kept"
"""The entry of a request's `mm_processor_kwargs`."""

MODEL_TYPES = ("qwen2_5_vl", "qwen3_vl")
"""The models whose images are sent whole, with indices: their tokens have places on three axes."""


def entries(images: Sequence[KeptEmbeddings]) -> list[dict[str, Any]]:
    """What a request says of its images.

    Args:
        images: What is kept of each.

    Raises:
        UnsupportedModelError: The method leaves tokens that stand for no place.
    """
    found = []
    for image in images:
        if image.grid is None or min(image.kept, default=-1) < 0:
            raise UnsupportedModelError(
                "The method leaves tokens that stand for no place in the image, and this model "
                "gives every token one; use a method that only drops tokens."
            )
        found.append({"grid": list(image.grid), "kept": list(image.kept)})
    return found


class KeysChecked:
    """What every processor of the plug-in does first: refuse what a request may not set.

    Whatever goes through to the processor of transformers changes how many tokens an image has,
    and the engine, which counts them by itself, would end.
    """

    info: Any

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Make of a request what the engine takes."""
        check_keys(inputs.hf_processor_mm_kwargs, self.info.by_request)
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]


def check_keys(given: Mapping[str, Any], taken: bool) -> None:
    """Refuse what a request may not set.

    Args:
        given: Its `mm_processor_kwargs`.
        taken: Whether the server takes indices.

    Raises:
        InputError: It sets anything else, or indices where none are taken.
    """
    if KEY in given and not taken:
        raise InputError(
            f"This server chooses what is kept of images, and takes no {KEY!r}; it would where it "
            'is started with "pore": {"by_request": true}, for Qwen2.5-VL or Qwen3-VL.'
        )
    others = sorted(set(given) - {KEY})
    if others:
        most = f"{KEY!r} alone" if taken else "nothing"
        raise InputError(
            f"The mm_processor_kwargs of a request may hold {most} here, not {others}: how images "
            "become tokens is the server's affair."
        )


def checked(given: Any, images: int) -> list[dict[str, Any] | None]:
    """The entries of a request, one for each of its images.

    Args:
        given: What the request says; None keeps all of every image.
        images: How many it has.

    Returns:
        For each, its grid and what is kept, which may be read without further checks; None keeps
        all of it.

    Raises:
        InputError: They are not of that form.
    """
    if given is None:
        return [None] * images
    if not isinstance(given, list) or len(given) != images:
        raise InputError(f"{KEY!r} is a list with one entry for each of the {images} images.")
    for number, entry in enumerate(given):
        if entry is not None:
            _check(entry, f"Entry {number} of {KEY!r}")
    return given


def _check(entry: Any, name: str) -> None:
    if not isinstance(entry, dict) or set(entry) != {"grid", "kept"}:
        raise InputError(f'{name} is not of the form {{"grid": [24, 36], "kept": [0, 5]}}.')
    grid, kept = entry["grid"], entry["kept"]
    if not _numbers(grid) or len(grid) != 2 or min(grid) < 1:
        raise InputError(f"{name}: its grid is not two numbers of tokens, (height, width).")
    if not _numbers(kept) or not kept:
        raise InputError(f"{name}: what is kept is not a list of whole numbers, at least one.")
    if any(one >= other for one, other in pairwise(kept)):
        raise InputError(f"{name}: what is kept does not ascend, or repeats a number.")
    if kept[0] < 0 or kept[-1] >= grid[0] * grid[1]:
        raise InputError(f"{name}: what is kept lies outside of 0 to {grid[0] * grid[1] - 1}.")


def _numbers(given: Any) -> bool:
    """Whether it is a list of whole numbers."""
    return isinstance(given, list) and all(type(one) is int for one in given)


def kept_of(entry: dict[str, Any] | None, grid: tuple[int, int], number: int) -> list[int]:
    """The tokens that a request keeps of an image.

    Args:
        entry: One of `checked`.
        grid: (height, width) of the image in tokens.
        number: Which image of the request it is, for the error.

    Raises:
        InputError: The image was ranked on another grid.
    """
    if entry is None:
        return list(range(grid[0] * grid[1]))
    if tuple(entry["grid"]) != grid:
        raise InputError(
            f"Entry {number} of {KEY!r} was chosen on {tuple(entry['grid'])} tokens, and the "
            f"server makes {grid} of that image; rank with the server's checkpoint and sizes."
        )
    kept: list[int] = entry["kept"]
    return kept
