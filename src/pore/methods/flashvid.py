"""FlashVID: attended and diverse tokens of every frame, and trees of like ones through time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pore.methods._checks import check_choice, check_share, check_whole
from pore.methods._merging_videos import Frames, Merged, TwoPartPruner, rounded_up
from pore.methods._segments import segments
from pore.methods.divprune import cosine_distance, farthest
from pore.tensors.clustering import density_peaks
from pore.tensors.gathering import cosine, widened
from pore.tensors.merging import group_means
from pore.tensors.selection import even_shares, proportional_shares, top_k

Selecting = Literal["attn_div_v2", "attn_div", "div", "attn"]

_NEIGHBOURS = 7
"""How many tokens of a frame, itself included, say how densely others lie around one; at most as
many as there are clusters."""


@dataclass(frozen=True)
class FlashVID(TwoPartPruner):
    """Keep attended, diverse tokens, and average trees of like ones (FlashVID, arXiv 2602.08024).

    First part, on the embeddings. The video is cut into segments between frames whose mean tokens
    have a cosine below `cut_below`, and between the least similar others until there are
    `segments`. Of every frame's budget, the share `alpha` goes to tokens that stay as they are,
    chosen one after the other (`diverse`). Of the other tokens, each whose cosine to the most
    similar one of the previous frame of its segment is above `merge_above` joins that one; the
    trees that arise become the mean of their tokens, at the place of the root. Where there are then
    more than the rest of the budget, they are clustered frame by frame by density peaks, and a
    cluster becomes the mean of its trees, at the place of its centre. Trees need every pair of
    tokens of neighbouring frames: T N² of them. Images beside a video stay whole.

    Second part, inside the decoder, if `layer` is given: the tokens that the last text token
    attends to most stay, as in FastV. With `reweight=P` that attention is divided by P (PoRe, arXiv
    2508.17807). The authors let the first part keep 1.25 times as many tokens as they ask for, and
    the second 0.3 of those from layer 20 of 28 on.

    The authors' code divides the sum of a tree by one more than the number of tokens that joined
    its root directly: a chain of three is divided by two. It takes chosen tokens of segments of one
    frame a second time, in clusters; and with `selecting="attn_div_v2"` a token can be chosen twice
    where weights are negative. Its numbers are rounded up frame by frame. Here a mean is a mean,
    nothing comes twice, and the budget is met. Of equal densities the authors choose by chance,
    here the first wins.

    Attributes:
        keep: Tokens of a video that enter the decoder (int), or the fraction (float).
        images_as_frames: Whether all images of a sample are the frames of one video, as where a
            processor hands frames over as images (InternVL, SmolVLM). `keep` is then of the video.
        faithful: Do as the authors' code; `keep` is a number of tokens or a fraction of a frame,
            rounded up.
        layer: K, the first decoder layer that sees what the second part leaves; it reads layer
            K - 1. None leaves that part out.
        inner: Tokens of a video that the second part leaves (int), or the fraction of those in the
            decoder, rounded up (float).
        reweight: The position bias P or another correction for the second part, or None.
        alpha: Share of a frame's tokens that are chosen to stay as they are, rounded up.
        selecting: By what. "div": the distance, one minus the cosine, to those chosen before.
            "attn_div": the same times the attention that a token gets in the vision tower.
            "attn_div_v2": also times the mean dot product of the token with the mean tokens of the
            frames of its segment. "attn": that attention alone.
        merge_above: Cosine above which a token joins one of the previous frame.
        cut_below: Cosine of frames below which a segment ends.
        segments: Segments to cut a video into at least.
    """

    inner: int | float = 0.3
    alpha: float = 0.7
    selecting: Selecting = "attn_div_v2"
    merge_above: float = 0.8
    cut_below: float = 0.9
    segments: int = 8

    name: ClassVar[str] = "FlashVID"
    paper: ClassVar[str] = "arXiv 2602.08024"
    reorders: ClassVar[str | None] = "takes some tokens twice"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(alpha=self.alpha)
        check_whole(1, segments=self.segments)
        check_choice(Selecting, selecting=self.selecting)

    def merge(self, video: Frames) -> Merged:
        """Chosen tokens as they are, and means of the others."""
        frames, size = video.attention.shape
        budgets = self._budgets(frames, size)
        found = []
        features = widened(video.tokens).mean(1)
        for part in segments(features, self.cut_below, self.segments):
            inside = slice(part.start, part.stop)
            one = Frames(video.tokens[inside], video.attention[inside])
            merged = self._of_segment(one, budgets[inside])
            found.append(Merged(merged.index + part.start * size, merged.tokens))
        index = torch.cat([merged.index for merged in found])
        order = index.argsort(stable=True)
        return Merged(index[order], torch.cat([merged.tokens for merged in found])[order])

    def left(self, count: int) -> int:
        """How many tokens the second part leaves."""
        return rounded_up(self.inner, count)

    def _budgets(self, frames: int, size: int) -> list[int]:
        """How many tokens stay of every frame."""
        if self.faithful:
            return [rounded_up(self.keep, size)] * frames
        return even_shares(self.kept(frames, size), [size] * frames)

    def _of_segment(self, video: Frames, budgets: Sequence[int]) -> Merged:
        """What goes on of one segment, with this budget for every frame."""
        counts = [math.ceil(budget * self.alpha) for budget in budgets]
        chosen = diverse(video, counts, self.selecting, self.faithful)
        selected = torch.zeros_like(video.attention, dtype=torch.bool)
        for frame, places in enumerate(chosen):
            selected[frame, places] = True
        size = selected.shape[1]
        index = torch.cat([places + frame * size for frame, places in enumerate(chosen)])
        as_is = Merged(index, video.tokens.flatten(0, 1)[index])
        rest = sum(budgets) - sum(counts)
        if rest == 0:
            return as_is
        alone = len(selected) == 1
        free = torch.ones_like(selected) if alone and self.faithful else ~selected
        roots, means = free, widened(video.tokens)
        if not alone:
            roots, means = self._trees(video.tokens, free, sum(budgets))
        there = roots.sum(1).tolist()
        if self.faithful:
            share = rest / sum(there)
            numbers = [math.ceil(n * share) if share < 1 else n for n in there]
        else:
            numbers = proportional_shares(rest, there, there)
        places, merged = clusters(means, roots, numbers)
        tokens = torch.cat([as_is.tokens, merged.to(as_is.tokens.dtype)])
        return Merged(torch.cat([index, places]), tokens)

    def _trees(self, tokens: Tensor, free: Tensor, least: int) -> tuple[Tensor, Tensor]:
        """The free tokens that no tree of a segment takes in, and the means of their trees.

        At least so many tokens stay, those that are not free among them.
        """
        best, parent = most_similar_before(tokens, free)
        merges = best > self.merge_above
        most = best.numel() - least
        if int(merges.sum()) > most:
            if self.faithful:
                border = best.flatten().topk(most).values[-1:].clamp(min=-1 + 1e-6)
                merges = best > border if most else torch.zeros_like(merges)
            else:
                merges = top_k(best.flatten()[None], [most]).view_as(best)
        means = tree_means(tokens, merges, parent, self.faithful)
        return free & ~merges, means


@torch.no_grad()
def diverse(
    video: Frames, counts: Sequence[int], selecting: Selecting, faithful: bool = False
) -> list[Tensor]:
    """Choose tokens of every frame that are far from each other and attended to.

    The first is that whose distance to the nearest other, weighted, is largest. Then, one after the
    other, that whose distance to the nearest of those chosen before is: the distance times the
    weight of the one to be chosen.

    Args:
        video: The frames of a segment.
        counts: How many to choose of every frame.
        selecting: What weighs, see `FlashVID`.
        faithful: Let a token be chosen again with "attn_div_v2", as in the authors' code.

    Returns:
        The chosen tokens of every frame, ascending.
    """
    if selecting == "attn":
        return [mask.nonzero()[:, 0] for mask in top_k(video.attention, counts)]
    if not any(counts):
        return [video.attention.new_empty(0, dtype=torch.long) for _ in counts]
    distance = cosine_distance(video.tokens)
    if selecting != "div":
        distance = distance * video.attention[:, None].to(distance.dtype)
    if selecting == "attn_div_v2":
        wide = widened(video.tokens)
        distance = distance * (wide @ wide.mean((0, 1)))[:, None]
    valid = torch.ones_like(video.attention, dtype=torch.bool)
    again = faithful and selecting == "attn_div_v2"
    order, _ = farthest(distance, max(counts), valid, faithful=again)
    return [picks[:count].sort().values for picks, count in zip(order, counts, strict=True)]


@torch.no_grad()
def most_similar_before(tokens: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar free token of the previous frame, for every free token.

    Args:
        tokens: (T, N, D) tokens of a segment's frames.
        free: (T, N) bool, the tokens that there are.

    Returns:
        (T, N) its cosine, -1 in the first frame and where there is none; and (T, N) its place.
    """
    likeness = cosine(tokens[1:], tokens[:-1])
    closed = ~free[1:, :, None] | ~free[:-1, None]
    best, place = likeness.masked_fill(closed, -1.0).max(-1)
    first = torch.full_like(best[:1], -1.0)
    return torch.cat([first, best]), torch.cat([torch.zeros_like(place[:1]), place])


def tree_means(tokens: Tensor, merges: Tensor, parent: Tensor, faithful: bool = False) -> Tensor:
    """The means of trees of tokens.

    Args:
        tokens: (T, N, D) tokens of a segment's frames.
        merges: (T, N) bool, the tokens that join one of the previous frame.
        parent: (T, N) its place there.
        faithful: Divide by one more than the number of tokens that join a root itself, as the
            authors' code does.

    Returns:
        (T, N, D), at least float32: at a root the mean of its tree. Arbitrary where one merges.
    """
    wide = widened(tokens)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    total, size = wide[-1], torch.ones_like(wide[0, :, 0])
    means = []
    for frame in range(len(tokens) - 1, -1, -1):
        means.append(total / size[:, None])
        if frame == 0:
            break
        joins = (parent[frame] == places[:, None]) & merges[frame]
        weights = joins.to(wide.dtype)
        total = wide[frame - 1] + weights @ total
        size = 1 + weights @ (torch.ones_like(size) if faithful else size)
    return torch.stack(means[::-1])


def clusters(tokens: Tensor, valid: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The means of clusters of the tokens of every frame, by density peaks.

    Args:
        tokens: (T, N, D).
        valid: (T, N) bool, which of them there are.
        counts: How many clusters to make of every frame, at most as many as it has tokens.

    Returns:
        index (m,), for every cluster which of the T * N tokens is its centre; and means (m, D).
    """
    if valid.sum(1).tolist() == list(counts):
        return valid.flatten().nonzero()[:, 0], tokens[valid]
    near_by = [min(_NEIGHBOURS, count) for count in counts]
    group, centres = density_peaks(tokens, counts, valid, neighbours=near_by)
    means, _ = group_means(tokens, group, valid, centres.shape[1])
    slots = torch.arange(centres.shape[1], device=centres.device)
    real = slots < torch.tensor(counts, device=centres.device)[:, None]
    frame = torch.arange(len(tokens), device=centres.device)[:, None]
    return (frame * tokens.shape[1] + centres)[real], means[real]
