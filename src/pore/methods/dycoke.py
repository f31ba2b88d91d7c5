"""DyCoke: frames that repeat another keep only what differs most from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pore.engine.stages import Limit, Selection, Stage, View
from pore.errors import BudgetError, InputError
from pore.families.base import Family
from pore.methods._videos import Video, VideoPruner, videos
from pore.tensors.gathering import inverse, widened
from pore.tensors.selection import by_score, check_finite, truncated

_BEFORE = (0, 1, 2, 1)
"""For every frame of a group of four, how many frames back is the one it is compared with."""


@dataclass(frozen=True)
class DyCoke(VideoPruner):
    """Drop what repeats a neighbouring frame: DyCoke's token merging (arXiv 2411.15024).

    Frames are taken in groups of four. The first of a group stays whole. The second and the third
    are compared with the first, the fourth with the third, place by place; those tokens stay that
    are least similar to the one at their place, by the cosine. Nothing is averaged, although the
    authors call it merging. The three share evenly what `keep` leaves beside the whole frames.

    It acts on the embeddings. The authors' second part, a cache of which every decoded token sees
    only some, is not offered: tokens that were dropped here would have to come back later. Images
    beside a video and videos of one frame stay whole.

    Attributes:
        keep: Tokens kept per video (int), or the fraction kept (float); at least every fourth frame
            whole.
        images_as_frames: Whether all images of a sample are the frames of one video, as where a
            processor hands frames over as images (InternVL, SmolVLM). `keep` is then of the video.
        faithful: Do as the authors' code: `keep` is a number of tokens or a fraction of each frame
            that is compared, rounded down (1 minus their merging ratio); in such a frame tokens
            stand by rising similarity; the third frame of the last group stays whole if the number
            of frames is a multiple of four; and of an odd number of frames the last is dropped. It
            needs five frames.
    """

    faithful: bool = False

    name: ClassVar[str] = "DyCoke"
    paper: ClassVar[str] = "arXiv 2411.15024"
    videos_only: ClassVar[bool] = True

    def stages(self) -> Sequence[Stage]:
        """One stage, on the embeddings."""
        return [Stage(0, self._select, merges=self.faithful)]

    def limits(self, family: Family) -> list[Limit]:
        """Tokens can change places only if positions are counted."""
        found = super().limits(family)
        if self.faithful and family.mrope:
            found.append(
                Limit(
                    "faithful=True orders tokens by similarity, but a visual token's position is "
                    "its place in the video; use faithful=False."
                )
            )
        return found

    def kept(self, frames: int, size: int) -> int:
        """The budget, which must be enough for every fourth frame."""
        return int(self._counts(frames, size).sum())

    def choose(self, tokens: Tensor) -> Tensor:
        """Every fourth frame, and what is least like it in the others."""
        counts = self._counts(*tokens.shape[:2]).to(tokens.device)
        return inverse(_by_change(tokens)) < counts[:, None]

    def _counts(self, frames: int, size: int) -> Tensor:
        """(T,) how many tokens every frame keeps."""
        place = torch.arange(frames)
        if self.faithful:
            return self._as_the_authors(place, size)
        if frames == 1:
            return torch.tensor([size])
        whole = place % 4 == 0
        count = super().kept(frames, size)
        left, others = count - size * int(whole.sum()), int((~whole).sum())
        if left < 0:
            raise BudgetError(
                f"keep={self.keep} leaves {count} of {frames} frames of {size} tokens, but every "
                f"fourth frame stays whole; ask for at least {size * int(whole.sum())}."
            )
        number = (~whole).cumsum(0) - 1
        return torch.where(whole, size, left // others + (number < left % others))

    def _as_the_authors(self, place: Tensor, size: int) -> Tensor:
        frames = len(place)
        if frames < 5:
            raise InputError(
                f"DyCoke with faithful=True needs at least five frames, and a video has {frames}; "
                "use faithful=False."
            )
        share = truncated(self.keep, size)
        compared = (place % 2 == 1) | ((place % 4 == 2) & (place < frames - 2))
        counts = torch.where(compared, share, size)
        counts[frames - frames % 2 :] = 0
        return counts

    def _select(self, view: View) -> Selection:
        selection = super()._select(view)
        if not self.faithful:
            return selection
        features, raster = view.features.clone(), view.layout.raster.clone()
        for video in videos(view.layout, self.images_as_frames):
            if len(video.slots) > 1:
                _reorder(video, selection.keep, features, raster)
        return Selection(selection.keep, features, raster)


def _by_change(tokens: Tensor) -> Tensor:
    """(T, N) the tokens of every frame by rising similarity to the frame it is compared with."""
    place = torch.arange(len(tokens), device=tokens.device)
    back = torch.tensor(_BEFORE, device=tokens.device)[place % 4]
    tokens = widened(tokens)
    likeness = torch.nn.functional.cosine_similarity(tokens, tokens[place - back], dim=-1)
    check_finite(likeness)
    return by_score(-likeness, torch.ones_like(likeness, dtype=torch.bool))


def _reorder(video: Video, keep: Tensor, features: Tensor, raster: Tensor) -> None:
    """Put what stays of every compared frame in the order of rising similarity."""
    tokens, marked, numbers = (video.of(values) for values in (features, keep, raster))
    order = _by_change(tokens)
    for frame in range(len(tokens)):
        stays = int(marked[frame].sum())
        if frame % 4 == 0 or stays == tokens.shape[1]:
            continue
        image, slots = video.images[frame, 0], video.slots[frame][marked[frame]]
        features[image, slots] = tokens[frame, order[frame, :stays]]
        raster[image, slots] = numbers[frame, order[frame, :stays]]
