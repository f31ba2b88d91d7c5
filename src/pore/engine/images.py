"""Which images a call of the model has, and which of those in the vision tower they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pore._compat.arguments import IDS, MASK
from pore.engine.records import CacheRecord
from pore.engine.setup import Setup
from pore.errors import InputError
from pore.families.base import Family
from pore.layout import Image, Layout, Tiling
from pore.tower.runs import TowerRuns


class Images:
    """Finds the images of every call, from what was encoded for it and from the caller's marks.

    `generate` encodes images before it calls the model, and the model is then not told their sizes.
    Prompts given as embeddings do not tell visual tokens from text at all.

    Args:
        model: The model.
        family: Its adapter.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self._model = model
        self._family = family
        self._tilings: dict[str, Sequence[Tiling]] = {}
        self._marks: Tensor | None = None
        self._prompt: Tensor | None = None

    def mark(self, visual: Tensor | None) -> None:
        """Take the marks of a caller, see `Run.mark_visual`."""
        self._marks = None if visual is None else visual.detach().to("cpu", torch.bool)
        self._prompt = None

    def note_tilings(self, tilings: Sequence[Tiling], videos: bool) -> None:
        """Take the tilings of images, or of videos, that are about to be encoded."""
        self._tilings["video_tilings" if videos else "tilings"] = tilings

    def find(
        self, inputs: dict[str, Any], embeds: Tensor, record: CacheRecord
    ) -> tuple[list[Image], Tensor | None]:
        """The images of a call.

        Args:
            inputs: Arguments of the multimodal model by name.
            embeds: (B, L, D) what enters the decoder.
            record: What is known of the cache.

        Returns:
            The images, and the marks that were used for this cache, now or before.

        Raises:
            InputError: There are only embeddings, and no marks that fit them.
        """
        if inputs.get(IDS) is not None:
            return self._family.images(self._model, {**inputs, **self._tilings}), record.marked
        fresh = self._marks is not None and self._marks is not record.marked
        if embeds.shape[1] == 1 or (record.seen > 0 and not fresh):
            return [], record.marked
        if self._marks is None:
            raise InputError(
                "The prompt is given as inputs_embeds, which do not tell visual tokens from text; "
                "say where they are with run.mark_visual(mask), or pass input_ids and pixels."
            )
        marks = self._spread(self._marks, embeds)
        return marked_images(marks, self._family.grid(self._model)), self._marks

    def _spread(self, marks: Tensor, embeds: Tensor) -> Tensor:
        """(B, L) marks for a prompt, or for one that goes on by an answer made without a cache."""
        batch, length = embeds.shape[:2]
        more = length - marks.shape[1]
        prompt = self._prompt
        goes_on = (
            more > 0
            and prompt is not None
            and torch.equal(embeds[:, : prompt.shape[1]], prompt.to(embeds))
        )
        if batch % marks.shape[0] or (more != 0 and not goes_on):
            raise InputError(
                f"mark_visual was given a mask of shape {tuple(marks.shape)}, but the prompt has "
                f"{batch} samples of {length} tokens; mark every prompt before it is given."
            )
        if more == 0:
            self._prompt = embeds.detach()
        marks = marks.repeat_interleave(batch // marks.shape[0], 0)
        return nn.functional.pad(marks, (0, more))


def marked_images(marked: Tensor, grid: tuple[int, int] | None) -> list[Image]:
    """The images of a mask of visual tokens: each unbroken run is one.

    Args:
        marked: (B, L) bool.
        grid: (height, width) of the family's images; used for runs with that many tokens.

    Returns:
        The images.
    """
    images = []
    for row, line in enumerate(marked.tolist()):
        index, start = 0, None
        for column, visual in enumerate([*line, False]):
            if visual and start is None:
                start = column
            elif not visual and start is not None:
                columns = range(start, column)
                fits = grid is not None and grid[0] * grid[1] == len(columns)
                images.append(Image(row, index, columns, grid if fits else None))
                index, start = index + 1, None
    return images


def placed(
    setup: Setup, images: Sequence[Image], tokens: Tensor, embeds: Tensor, tower: TowerRuns | None
) -> tuple[Layout | None, list[int]]:
    """Where those visual tokens of a call lie that the attention mask shows.

    Args:
        setup: The method in the model.
        images: The call's images.
        tokens: (B, L) bool, False at what the attention mask hides.
        embeds: (B, L, D) what enters the decoder.
        tower: What the vision tower saw last; None where the method does not read it.

    Returns:
        The layout, None where the mask hides all images; and which of the images in the tower every
        one of them is, empty where the tower is not read.

    Raises:
        InputError: The tower saw other images; or what is kept was chosen there, where no mask is
            known, and the mask hides visual tokens.
    """
    layout = Layout.of(images, tokens)
    encoded: list[int] = []
    if tower is not None:
        matched = tower.match(layout, embeds)
        if matched is None:
            raise InputError(
                f"{setup.method.name} with these settings reads what goes through the vision "
                f"tower, but the features of these {len(images)} images were made before; pass "
                "pixel_values inside the block."
            )
        encoded = matched
    if bool((layout.gather(layout.tokens) | ~layout.valid).all()):
        return layout, encoded
    if setup.tower is not None:
        raise InputError(
            f"The {MASK} hides visual tokens, but {setup.method.name} chooses among them in the "
            "vision tower, which knows of no mask; show them, or use a method that acts on the "
            "embeddings or in the decoder."
        )
    shown = _shown_images(images, tokens)
    encoded = [encoded[number] for number, _ in shown] if encoded else []
    return Layout.of([image for _, image in shown], tokens) if shown else None, encoded


def _shown_images(images: Sequence[Image], tokens: Tensor) -> list[tuple[int, Image]]:
    """The number of every image with tokens that are shown, and the image with only those."""
    shown = tokens.tolist()
    found = []
    for number, image in enumerate(images):
        places = [i for i, column in enumerate(image.columns) if shown[image.row][column]]
        if places:
            found.append((number, image.showing(places)))
    return found
