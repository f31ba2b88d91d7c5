"""What methods share that merge tokens of a video by the attention of the vision tower."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pore.bias.where import Positions
from pore.engine.corrections import Correction, Reweight, correction_of
from pore.engine.limits import check_layer
from pore.engine.readers import LastToken
from pore.engine.stages import Limit, Merges, Selection, Stage, View
from pore.errors import BudgetError
from pore.families.base import Family
from pore.identity import at_hand
from pore.layout import Layout
from pore.methods._tower import tower_attention
from pore.methods._videos import OfVideos, Video, naming
from pore.tensors.selection import budget, check_finite, check_keep, top_k
from pore.tower.stages import TowerAttention


@dataclass(frozen=True)
class Frames:
    """A video of T frames of N tokens each, as it enters the decoder.

    Attributes:
        tokens: (T, N, D) its tokens.
        attention: (T, N) the attention that each gets in the vision tower.
        pooled: (T, F) what the tower's pooling head makes of every frame; None without one.
    """

    tokens: Tensor
    attention: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True)
class Merged:
    """What goes on of a video.

    Attributes:
        index: (m,) for every token, in order, which of the T * N it stands for.
        tokens: (m, D) their states.
    """

    index: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, keep: Tensor, tokens: Tensor) -> Merged:
        """The tokens (T, N, D) where (T, N) `keep` is True, in raster order."""
        return cls(keep.flatten().nonzero()[:, 0], tokens[keep])


@dataclass(frozen=True)
class MergingVideoPruner(OfVideos):
    """A method that keeps some tokens of a video, some of them merged from others.

    It acts on the embeddings and reads attention of the vision tower. A subclass defines `name` and
    `merge`. Keeping all tokens leaves a video as it is.

    Attributes:
        keep: Tokens kept per video (int), or the fraction kept (float).
        images_as_frames: Whether all images of a sample are the frames of one video, as where a
            processor hands frames over as images (InternVL, SmolVLM). `keep` is then of the video.
        faithful: Do as the authors' code.
        attends: Which attention of the vision tower it reads.
        positions: Whether tokens keep their "original" positions, or are counted anew ("dense")
            where positions are counted.
        reorders: What the authors' code does that needs positions to be counted anew, as the end of
            a sentence; None where it does nothing of the kind.
    """

    faithful: bool = False

    videos_only: ClassVar[bool] = True
    merges: ClassVar[Merges] = "some"
    attends: ClassVar[TowerAttention] = "received"
    positions: ClassVar[Positions] = "dense"
    reorders: ClassVar[str | None] = None

    @abstractmethod
    def merge(self, video: Frames) -> Merged:
        """What goes on of a video.

        Raises:
            BudgetError: So few tokens cannot be kept, or so many.
        """

    def kept(self, frames: int, size: int) -> int:
        """The budget; what the authors' code keeps depends on the video."""
        if self.faithful:
            raise BudgetError(
                f"With faithful=True it depends on the video how many tokens {self.name} keeps; "
                "leave it off for a number that is known in advance."
            )
        return super().kept(frames, size)

    def stages(self) -> Sequence[Stage]:
        """One stage, on the embeddings, which reads attention of the tower."""
        return [
            Stage(
                0,
                self._select,
                positions=self.positions,
                tower=True,
                tower_attention=self.attends,
                merges=True,
                in_place=self._in_place,
            )
        ]

    def limits(self, family: Family) -> list[Limit]:
        """Tokens can leave their places only if positions are counted."""
        found = super().limits(family)
        if family.mrope and not self._in_place:
            found.append(
                Limit(
                    f"faithful=True {self.reorders}, but a visual token's position is its place in "
                    "the video; use faithful=False."
                )
            )
        return found

    @property
    def _in_place(self) -> bool:
        """Whether all that goes on is at the place of a token that it stands for."""
        return self.reorders is None or not self.faithful

    def _select(self, view: View) -> Selection:
        layout = view.layout
        found, keep = self.to_choose(layout)
        features, raster = view.features.clone(), layout.raster.clone()
        attention = tower_attention(view, self.attends)
        check_finite(attention[layout.valid], what="Attention of the vision tower")
        for video in found:
            tokens = video.of(features)
            frames, size = tokens.shape[:2]
            with naming(video):
                if not self.faithful and self.kept(frames, size) == frames * size:
                    keep[video.images, video.slots] = True
                    continue
                merged = self.merge(Frames(tokens, video.of(attention), _pooled(view, video)))
            _put(video, merged, keep, features, raster)
        return Selection(keep, features, raster)


def _pooled(view: View, video: Video) -> Tensor | None:
    """(T, F) what a pooling head makes of every frame; the mean where one has several tiles."""
    assert view.tower is not None
    found = []
    for i in sorted(set(video.images[:, 0].tolist())):
        pooled = view.tower[i].pooled
        if pooled is None:
            return None
        found.append(pooled if view.layout.images[i].frames > 1 else pooled.mean(0, keepdim=True))
    return torch.cat(found).to(video.slots.device)


def _put(video: Video, merged: Merged, keep: Tensor, features: Tensor, raster: Tensor) -> None:
    """Put what goes on of a video in the slots of tokens that it stands for, in its order.

    Tokens that stand for the same one, if there are such, fill the first of the other slots.
    """
    total = video.slots.numel()
    taken = torch.zeros(total, dtype=torch.bool, device=keep.device)
    taken[merged.index] = True
    more = len(merged.index) - int(taken.sum())
    if more > total - int(taken.sum()):
        raise BudgetError(
            f"The authors' code makes {len(merged.index)} tokens of {total}; keep fewer."
        )
    taken[(~taken).nonzero()[:more, 0]] = True
    images = video.images.expand_as(video.slots).flatten()[taken]
    slots = video.slots.flatten()[taken]
    numbers = video.of(raster).flatten()[merged.index]
    keep[images, slots], raster[images, slots] = True, numbers
    features[images, slots] = merged.tokens


@dataclass(frozen=True)
class TwoPartPruner(MergingVideoPruner):
    """A method that also drops tokens of a video before a decoder layer, by text-visual attention.

    A subclass defines `name`, `merge`, and for the second part, which reads the attention of the
    last text token in the layer before, `left` and, if it merges there, `thinned`.

    Attributes:
        keep: Tokens of a video that enter the decoder (int), or the fraction (float).
        images_as_frames: Whether all images of a sample are the frames of one video, as where a
            processor hands frames over as images (InternVL, SmolVLM). `keep` is then of the video.
        faithful: Do as the authors' code.
        layer: K, the first decoder layer that sees what the second part leaves. None leaves that
            part out.
        inner: Tokens of a video that the second part leaves (int), or the fraction of those in the
            decoder (float).
        reweight: The position bias P or another correction for the second part, or None.
    """

    layer: int | None = None
    inner: int | float = 0.5
    reweight: Reweight | None = None

    reweightable: ClassVar[bool] = True
    merges_inside: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.inner)
        if self.layer is None and self.reweight is not None:
            raise BudgetError(
                f"reweight corrects the attention that ranks in the second part of {self.name}; "
                "give it a layer."
            )

    @abstractmethod
    def left(self, count: int) -> int:
        """How many of a video's tokens in the decoder the second part leaves."""

    def thinned(self, states: Tensor, kept: Tensor) -> Tensor:
        """New states (n, D) of a video's tokens, of which those stay that are `kept` (n,).

        For methods that merge there; by default states stay as they are.
        """
        return states

    def stages(self) -> Sequence[Stage]:
        """One stage on the embeddings, and one before layer K if that is given."""
        first = list(super().stages())
        if self.layer is None:
            return first
        second = Stage(
            self.layer,
            self._thin,
            LastToken(),
            correction=self._correction,
            merges=self.merges_inside,
        )
        return [*first, second]

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse a layer that the decoder does not have, and a bias measured elsewhere."""
        if self.layer is None:
            return
        check_layer(self.layer, family, model)
        if self._correction is not None:
            measures = LastToken().measures
            self._correction.check(layer=self.layer, normalize=measures, **at_hand(model))

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image, a video of one frame, that enter every decoder layer."""
        first = self.kept(1, visual)
        at = layers if self.layer is None else self.layer
        return [first] * at + [self.left(first)] * (layers - at)

    @property
    def _correction(self) -> Correction | None:
        return correction_of(self.reweight)

    def _thin(self, view: View) -> Selection:
        layout = view.layout
        scores, states = view.corrected(view.attention), view.features
        keep = layout.valid.clone()
        features = states.clone() if self.merges_inside else None
        for owners in self._of_each(layout):
            inside = layout.valid[owners]
            owned = torch.zeros_like(keep)
            owned[owners] = inside
            kept = top_k(scores[owned][None], [self.left(int(inside.sum()))])[0]
            keep[owned] = kept
            if features is not None:
                features[owned] = self.thinned(states[owned], kept)
        return Selection(keep, features)

    def _of_each(self, layout: Layout) -> list[list[int]]:
        """The images of every video among the images of a layout."""
        number = range(len(layout.images))
        if self.images_as_frames:
            rows = [image.row for image in layout.images]
            return [[i for i in number if rows[i] == row] for row in sorted(set(rows))]
        return [[i] for i in number if layout.images[i].of_video]


def rounded_up(keep: int | float, available: int) -> int:
    """`budget`, with a fraction rounded up."""
    count = keep if isinstance(keep, int) else min(math.ceil(available * keep), available)
    return budget(count, available)
