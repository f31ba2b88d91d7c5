"""FrameFusion: tokens like those a frame earlier are merged, then the rest is pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pore.engine.corrections import Reweight, correction_of
from pore.engine.readers import LastToken, LayerAttention
from pore.engine.stages import Merges, Selection, Stage, View
from pore.errors import BudgetError
from pore.families.base import Family
from pore.identity import at_hand
from pore.methods._videos import OfVideos, Video, naming
from pore.tensors.gathering import unit, widened
from pore.tensors.selection import budget, check_finite, top_k

_DEPTH = 28
"""Decoder layers of the authors' model."""


@dataclass(frozen=True)
class FrameFusion(OfVideos):
    """Merge what repeats from frame to frame, then prune once by attention (arXiv 2501.01986).

    It is called on the embeddings, and then between attention and MLP of every decoder layer, until
    it has finished. A call merges every token into the one before it at the same place of the frame
    if the cosine of their states is `similarity` or more; a token that stays becomes the plain mean
    of itself and the run that goes into it. Once a call merges less than the share `least` of the
    tokens left, the next one prunes: those stay that the last text token attends to most in the
    layer at hand, averaged over heads. If merging alone would leave fewer than asked for, only the
    most similar are merged, and that is all. Tokens keep their positions. Images beside a video
    stay whole.

    The MLP of a layer in which tokens go still runs on all that entered the layer, as it computes
    every token by itself: what is kept is the same, and FLOPs are counted so.

    Attributes:
        keep: Tokens left of a video at the end (int), or the fraction (float); with `average` that
            many on average over the decoder layers.
        images_as_frames: Whether all images of a sample are the frames of one video, as where a
            processor hands frames over as images (InternVL, SmolVLM). `keep` is then of the video.
        similarity: The least cosine of tokens that are merged. The authors have other values for
            other models.
        least: The share of tokens left that a call must merge for merging to go on.
        average: Whether `keep` is the mean number of tokens that enter a decoder layer, the
            authors' `cost`, in place of the number at the end.
        reweight: The position bias P or another correction of the attention that prunes, or None.
        faithful: With `average`, count as if the decoder had 28 layers, as the authors' code does,
            and go on after the last of them if need be.
    """

    similarity: float = 0.6
    least: float = 0.1
    average: bool = False
    reweight: Reweight | None = None
    faithful: bool = False

    name: ClassVar[str] = "FrameFusion"
    paper: ClassVar[str] = "arXiv 2501.01986"
    merges: ClassVar[Merges] = "some"
    videos_only: ClassVar[bool] = True
    reweightable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.faithful and not self.average:
            raise BudgetError(
                "With faithful=True `keep` is the authors' cost, a mean over layers; set "
                "average=True too."
            )
        if not -1 <= self.similarity <= 1:
            raise BudgetError(f"similarity={self.similarity!r} is not a cosine; choose -1 to 1.")
        if not 0 <= self.least <= 1:
            raise BudgetError(f"least={self.least!r} is not a share of the tokens; choose 0 to 1.")
        correction_of(self.reweight)

    def stages(self) -> Sequence[Stage]:
        """Where it acts in the authors' model."""
        return self.stages_in(_DEPTH)

    def stages_in(self, depth: int) -> Sequence[Stage]:
        """On the embeddings, and in every layer whose successor is to see fewer tokens."""
        reach = depth if self.faithful else depth - 1
        inner = [
            Stage(
                layer,
                partial(self._fuse, layer, depth),
                _IfPruning(layer == reach and not self.faithful),
                prepare=self._begin,
                merges=True,
                in_place=True,
                before_mlp=True,
                correction=correction_of(self.reweight),
                idle=_all_finished,
            )
            for layer in range(1, reach + 1)
        ]
        entry = Stage(
            0,
            partial(self._fuse, 0, depth),
            prepare=self._begin,
            positions="original",
            merges=True,
            in_place=True,
        )
        return [entry, *inner]

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse a bias that was measured elsewhere; which layer prunes shows only in a video.

        Raises:
            BudgetError: There is no layer after one whose attention could be read.
        """
        if len(family.layers(model)) < 2:
            raise BudgetError("FrameFusion needs two decoder layers, to read one and prune after.")
        correction = correction_of(self.reweight)
        if correction is not None:
            correction.check(normalize=LastToken().measures, **at_hand(model))

    def counts(self, visual: int, layers: int) -> list[int]:
        """Not known in advance.

        Raises:
            BudgetError: Always.
        """
        raise BudgetError(
            "How many tokens FrameFusion merges in which layer depends on what the video shows; "
            "`keep` is what is left at the end, or with average=True the mean over the layers."
        )

    def _begin(self, view: View) -> _Progress:
        """Which tokens are of which video, and where in its frames."""
        layout = view.layout
        found, _ = self.to_choose(layout)
        owner = torch.full_like(layout.raster, -1)
        place = torch.zeros_like(layout.raster)
        fusions: list[_Fusion] = []
        for video in found:
            frames, size = video.slots.shape
            raster = video.of(layout.raster)
            images = video.images.expand_as(video.slots)
            owner[images, raster] = len(fusions)
            place[images, raster] = torch.arange(size, device=place.device).expand(frames, -1)
            fusions.append(_Fusion(video.sample, frames * size, self._target(video)))
        return _Progress(owner, place, fusions)

    def _target(self, video: Video) -> float:
        """The number of tokens that a video is to have at the end, or the fraction on average."""
        total = video.slots.numel()
        with naming(video):
            count = budget(self.keep, total)
        if not self.average:
            return count
        return self.keep if isinstance(self.keep, float) else self.keep / total

    def _fuse(self, layer: int, depth: int, view: View) -> Selection:
        layout, progress = view.layout, view.memory
        assert isinstance(progress, _Progress)
        raster = layout.raster
        owner = progress.owner.to(raster.device).gather(1, raster.clamp(min=0))
        owner = owner.masked_fill(~layout.valid | (raster < 0), -1)
        place = progress.place.to(raster.device).gather(1, raster.clamp(min=0))
        keep, states, features = layout.valid.clone(), None, view.features
        scores = None if view.attention is None else view.corrected(view.attention)
        last = 0 < layer == depth - 1 and not self.faithful
        for number, fusion in enumerate(progress.fusions):
            if fusion.finished:
                continue
            at = (owner == number).nonzero(as_tuple=True)
            goals = self._goals(fusion, len(at[0]), _DEPTH if self.faithful else depth)
            if last or not fusion.merging:
                assert scores is not None
                keep[at] = top_k(scores[at][None], [goals.pruned])[0]
                fusion.finished = True
                continue
            merged, means = self._merge(fusion, goals, widened(features[at]), place[at])
            keep[at] = ~merged
            if bool(merged.any()):
                states = features if states is None else states
                states = states.index_put(at, means.to(states.dtype))
        return Selection(keep, states)

    def _goals(self, fusion: _Fusion, left: int, depth: int) -> _Goals:
        """How many of the tokens left are to go, with an eye to the layers to come."""
        if not self.average:
            count = min(int(fusion.target), left)
            return _Goals(1 - count / left, left - count, count)
        share = required(fusion.shares, fusion.target, depth)
        if share is None:
            raise BudgetError(
                f"keep={self.keep} on average over {depth} layers is spent after "
                f"{len(fusion.shares)} of them, in a video of sample {fusion.sample} of "
                f"{fusion.total} visual tokens; ask for more, or lower `similarity`."
            )
        return _Goals(share, int(share * left), round(left * (1 - share)))

    def _merge(
        self, fusion: _Fusion, goals: _Goals, states: Tensor, place: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One merging call on (n, D) states of a video's tokens at places (n,).

        Returns:
            (n,) bool, True at tokens that went into another; and (n, D) new states.
        """
        order, likeness = by_place(states, place)
        check_finite(likeness)
        close, left = likeness >= self.similarity, len(place)
        count = int(close.sum())
        enough = count >= goals.surplus if not self.average else count / left >= goals.share
        if enough:
            close = top_k(likeness[None], [goals.surplus])[0]
            fusion.merging, fusion.finished = False, True
        else:
            fusion.shares.append(count / left)
            fusion.merging = count / left >= self.least
        return fused(states, order, close)


@dataclass
class _Fusion:
    """How far a video is.

    Attributes:
        sample: Which sample of the batch it belongs to.
        total: Its tokens at first.
        target: Tokens to leave at the end, or with `average` the mean share.
        shares: Of every call so far, the share of the tokens then left that it merged.
        merging: Whether it is still merged.
        finished: Whether nothing is to happen any more.
    """

    sample: int
    total: int
    target: float
    shares: list[float] = field(default_factory=list)
    merging: bool = True
    finished: bool = False


@dataclass
class _Progress:
    """How far the videos of a prompt are.

    Attributes:
        owner: (I, t) by raster index, which of them a token is of; -1 for none.
        place: (I, t) likewise, where in its frame.
        fusions: One for each.
    """

    owner: Tensor
    place: Tensor
    fusions: list[_Fusion]


@dataclass(frozen=True)
class _Goals:
    """What a call has to reach.

    Attributes:
        share: The share of the tokens left that is to go.
        surplus: How many these are for a call that merges.
        pruned: How many a call that prunes leaves.
    """

    share: float
    surplus: int
    pruned: int


@dataclass(frozen=True)
class _IfPruning:
    """Reads the attention of the last text token where a video is to be pruned now.

    Attributes:
        always: Whether every video that has not finished is.
    """

    always: bool

    def __call__(self, attention: LayerAttention) -> Tensor | None:
        """(I, t) the attention, or None where it is not needed."""
        fusions = attention.memory.fusions
        if any(not one.finished and (self.always or not one.merging) for one in fusions):
            return LastToken()(attention)
        return None


def _all_finished(progress: Any) -> bool:
    return all(fusion.finished for fusion in progress.fusions)


def required(shares: Sequence[float], cost: float, depth: int) -> float | None:
    """The share of the tokens left that must go for all layers to have `cost` of them on average.

    Args:
        shares: What every call so far took of the tokens then left; each stands for a layer.
        cost: The mean share of the original tokens.
        depth: Decoder layers.

    Returns:
        The share, at least 0; None where the layers so far have used up all.
    """
    left, spent = 1.0, 0.0
    for share in shares:
        left *= 1 - share
        spent += left
    rest = depth * cost - spent
    if rest < 0:
        return None
    ahead = rest / ((depth - len(shares)) * left)
    return 0.0 if ahead > 1 else 1 - ahead


def by_place(states: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens place by place, and how like each is to the one before it there.

    Args:
        states: (n, D) states of a video's tokens, in the order of the sequence.
        place: (n,) where in its frame each lies.

    Returns:
        order (n,), the tokens by place and then by frame; and (n,) cosines in that order, -2 for
        the first token of a place.
    """
    order = place.argsort(stable=True)
    with torch.no_grad():
        directions = unit(states)[order]
        likeness = (directions[:-1] * directions[1:]).sum(-1)
        likeness = likeness.masked_fill(place[order].diff() != 0, -2.0)
        return order, torch.cat([likeness.new_full((1,), -2.0), likeness])


def fused(states: Tensor, order: Tensor, close: Tensor) -> tuple[Tensor, Tensor]:
    """Put tokens into the last one before them that stays.

    Args:
        states: (n, D) states.
        order: (n,) the tokens by place and then by frame.
        close: (n,) bool in that order, True at those that go; never the first of a place.

    Returns:
        (n,) bool, True at those that go, and (n, D) states, in which what stays has the mean of
        itself and of what went into it.
    """
    merged = torch.zeros_like(close).scatter(0, order, close)
    if not bool(close.any()):
        return merged, states
    heads = (~close).nonzero()[:, 0]
    ends = torch.cat([heads[1:], heads.new_tensor([len(order)])])
    sizes = ends - heads
    total = states[order[heads]]
    for step in range(1, int(sizes.max())):
        more = (sizes > step).nonzero()[:, 0]
        total = total.index_put((more,), total[more] + states[order[heads[more] + step]])
    return merged, states.index_put((order[heads],), total / sizes[:, None])
