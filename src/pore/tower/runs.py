"""The vision tower as the engine asks it: images and videos may come in one prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pore.changes import Changes
from pore.errors import UnsupportedModelError
from pore.families.base import Family
from pore.layout import Layout, Tiling
from pore.tower.packed import PackedTowerRun
from pore.tower.run import Placed, TowerRun
from pore.tower.stacked import StackedTowerRun
from pore.tower.stages import Encoded, TowerAttention, TowerStage


class TowerRuns:
    """The last passes through a model's vision tower, one of images and one of videos.

    The model encodes images and videos one after the other, by the same tower or by two. Each has
    a `TowerRun`, whose hooks only run while something of its kind is encoded.

    Args:
        changes: What takes the hooks off the model.
        model: The model.
        family: Its adapter.
        stage: The stage in the tower; None only watches.
        remember: Whether to keep what `encoded` returns.
        attend: The kinds of attention that are to be among it.
        note: Takes what the report should say about the method in this tower.
    """

    def __init__(
        self,
        changes: Changes,
        model: nn.Module,
        family: Family,
        stage: TowerStage | None,
        remember: bool,
        attend: frozenset[TowerAttention],
        note: Callable[[str], None],
    ) -> None:
        self._family = family
        self._stage = stage
        self._note = note
        self._encoding_videos = False
        kind = PackedTowerRun if family.packed else StackedTowerRun
        images = kind(
            changes,
            model,
            family,
            stage,
            remember,
            attend,
            active=lambda: not self._encoding_videos,
        )
        self._runs: dict[bool, TowerRun] = {False: images}
        if family.encodes_videos and (stage is None or stage.merge is None):
            self._runs[True] = kind(
                changes,
                model,
                family.of_videos,
                stage,
                remember,
                attend,
                active=lambda: self._encoding_videos,
            )
        for text in images.notes:
            note(text)

    @property
    def block_tokens(self) -> list[int]:
        """How many tokens were left in every block; empty where blocks do not merge."""
        return self._runs[False].block_tokens

    def note_tilings(self, tilings: Sequence[Tiling], videos: bool) -> None:
        """Take note of how images or videos that are about to be encoded are cut into tiles.

        Raises:
            UnsupportedModelError: No method can choose among their tokens in the tower.
        """
        if videos and self._stage is not None and self._stage.prompts:
            raise UnsupportedModelError(
                "The method compares the patches of single images with the question of their "
                "prompt; use another one for videos."
            )
        if videos and True not in self._runs:
            raise UnsupportedModelError(
                "Patches are merged from block to block of the vision tower, before it is known "
                "which share of the budget a frame of a video gets, and where frames are pooled "
                "the grid must be whole; use a method that chooses among the tokens."
            )
        if not videos and any(tiling.blended for tiling in tilings):
            raise UnsupportedModelError(
                "The tokens of an image as large as one of these are not patches that went through "
                f"{self._family.name}'s vision tower one by one; use a method that acts on the "
                "embeddings or in the decoder."
            )
        run = self._runs[videos]
        run.note_tilings(tilings)
        for text in run.notes:
            self._note(text)
        self._encoding_videos = videos

    def encoding_done(self) -> None:
        """What was about to be encoded has been."""
        self._encoding_videos = False

    def match(self, layout: Layout, embeds: Tensor) -> list[int] | None:
        """Find the images and videos of a prefill among those that went through last.

        Args:
            layout: The images of the prefill.
            embeds: (B, L, D) embeddings that enter the decoder.

        Returns:
            The number of each, counted among images or among videos; None if they are not those
            that went through last.

        Raises:
            ScoreError: The features hold NaN or infinity, so they cannot be compared.
        """
        numbers = [0] * len(layout.images)
        for run, mine in self._by_kind(layout):
            found = run.match(layout.only(mine), embeds)
            if found is None:
                return None
            for i, number in zip(mine, found, strict=True):
                numbers[i] = number
        return numbers

    def encoded(self, layout: Layout, numbers: Sequence[int]) -> tuple[Encoded, ...]:
        """What the tower made of every image, if it was to be remembered.

        Args:
            layout: The images of the prefill.
            numbers: The number of each, see `match`.
        """
        pairs = zip(layout.images, numbers, strict=True)
        return tuple(self._runs[image.of_video].encoded(number) for image, number in pairs)

    def pictures(self, numbers: Sequence[int]) -> Tensor:
        """(I, 3, H, W) pixel values of images by number; of each image, its first tile.

        Only a tower that takes images of one size has them.
        """
        return self._runs[False].pictures(numbers)

    def placed(self, layout: Layout, numbers: Sequence[int], features: Tensor) -> Placed:
        """Which placeholders hold the tokens that the stage kept.

        Args:
            layout: The images of the prefill.
            numbers: The number of each, see `match`.
            features: (I, t, D) what the model has put at the placeholders.
        """
        keep, raster = torch.zeros_like(layout.valid), torch.zeros_like(layout.raster)
        filled, structure = None, [True] * len(layout.images)
        for run, mine in self._by_kind(layout):
            own = run.placed(layout.only(mine), [numbers[i] for i in mine], features[mine])
            keep[mine], raster[mine] = own.keep, own.raster
            if own.features is not None:
                filled = features.clone() if filled is None else filled
                filled[mine] = own.features
            for i, stays in zip(mine, own.structure or (), strict=False):
                structure[i] = stays
        return Placed(keep, raster, filled, structure)

    def _by_kind(self, layout: Layout) -> list[tuple[TowerRun, list[int]]]:
        """The run of images and that of videos, and which of a layout's images are its own."""
        found = []
        for videos, run in self._runs.items():
            mine = [i for i, image in enumerate(layout.images) if image.of_video == videos]
            if mine:
                found.append((run, mine))
        return found
