"""HoliTom: what stands still is averaged over time and clustered, the rest kept by attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, one_hot

from pore.methods._checks import check_share, check_whole
from pore.methods._merging_videos import Frames, Merged, TwoPartPruner
from pore.tensors.clustering import density_peaks
from pore.tensors.gathering import cosine, widened
from pore.tensors.merging import group_means
from pore.tensors.selection import budget, check_finite, proportional_shares, top_k


@dataclass(frozen=True)
class HoliTom(TwoPartPruner):
    """Merge what stands still, and keep the most attended of the rest (HoliTom, arXiv 2505.21334).

    First part, on the embeddings. A token is still if its cosine to the one at its place in the
    next frame is above `tau`. The video is cut into windows of frames so that as many tokens as
    possible are at places that are still throughout their window. Such a place becomes one token,
    the mean over the window, at the first of its frames. What they and all other tokens come to is
    then thinned out to the budget, every window's means and the rest of every frame in proportion.
    The means are clustered by density peaks: a centre becomes `beta` times itself plus 1 - `beta`
    times the mean of the others in its cluster. Of the rest, the tokens with the most attention in
    the vision tower stay. Images beside a video stay whole.

    Second part, inside the decoder, if `layer` is given: the tokens that the last text token
    attends to most stay, and each of the others is merged into the most similar of them (`halved`).
    With `reweight=P` the
    attention that ranks there is divided by P (PoRe, arXiv 2508.17807).

    The authors' code rounds means half to even and the rest up, frame by frame, and so misses the
    budget; and keeps less where still places alone make the video shorter than it asks. Here such a
    budget is met by still tokens that stay as they are, those with the most attention. The rule for
    `D` > 0 in the paper cannot be run in their code and is not offered. Of equal densities the
    authors choose by chance, here the first wins.

    Attributes:
        keep: Tokens of a video that enter the decoder (int), or the fraction (float).
        images_as_frames: Whether all images of a sample are the frames of one video, as where a
            processor hands frames over as images (InternVL, SmolVLM). `keep` is then of the video.
        layer: K, the first decoder layer that sees what the second part leaves; it reads layer
            K - 1. None leaves that part out. The authors use 18 of 28.
        inner: Fraction of a video's tokens in the decoder that the second part leaves, half to
            even.
        reweight: The position bias P or another correction for the second part, or None.
        tau: Cosine above which a token is still; the authors use 0.65 where they keep 10 %.
        beta: Weight of a centre in its cluster. None takes the plain mean of a cluster.
        neighbours: Nearest means, a mean itself included, that make one dense; at most as many as
            there are clusters.
        longest: Frames of a window at most.
        faithful: Do as the authors' code: round as they do, and give the decoder the means of a
            window before the rest of its first frame.
    """

    tau: float = 0.8
    beta: float | None = 0.6
    neighbours: int = 7
    longest: int = 1024

    name: ClassVar[str] = "HoliTom"
    paper: ClassVar[str] = "arXiv 2505.21334"
    reorders: ClassVar[str | None] = "puts means of several frames before the rest of a frame"
    merges_inside: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(1, neighbours=self.neighbours, longest=self.longest)
        if self.beta is not None:
            check_share(beta=self.beta)

    def merge(self, video: Frames) -> Merged:
        """Means of what is still, and the most attended of the rest."""
        windows = still_windows(place_similarity(video.tokens) > self.tau, self.longest)
        plan = self._plan(windows, video.attention)
        means = windows.means(video.tokens, plan.spare)
        centres, merged = clustered(means, windows.still, plan.means, self.neighbours, self.beta)
        rest = top_k(video.attention, plan.rest, ~windows.still[windows.number])
        first = [window.start for window in windows.frames]
        central = torch.zeros_like(rest)
        central[first] = centres
        keep = central | rest | plan.spare
        tokens = video.tokens.clone()
        tokens[central] = merged[centres].to(tokens.dtype)
        if not self.faithful:
            return Merged.of(keep, tokens)
        frame = torch.arange(len(keep), device=keep.device)[:, None]
        index = keep.flatten().nonzero()[:, 0]
        order = (2 * frame + (~central).long()).flatten()[index].argsort(stable=True)
        return Merged(index[order], tokens.flatten(0, 1)[index[order]])

    def left(self, count: int) -> int:
        """How many tokens the second part leaves."""
        return budget(self.inner, count)

    def thinned(self, states: Tensor, kept: Tensor) -> Tensor:
        """Every token that goes is merged into the one most like it."""
        return halved(states, kept)

    def _plan(self, windows: Windows, attention: Tensor) -> Plan:
        """How many tokens stay, of a video with (T, N) attention."""
        still = windows.still.sum(1).tolist()
        frames, size = attention.shape
        others = [size - still[number] for number in windows.number.tolist()]
        none = torch.zeros_like(attention, dtype=torch.bool)
        left = sum(still) + sum(others)
        if self.faithful:
            share = min(self.share(frames, size) / (left / (frames * size)), 1)
            means = [round(count * share) for count in still]
            return Plan(means, [math.ceil(count * share) for count in others], none)
        count = self.kept(frames, size)
        sizes = [*still, *others]
        shares = proportional_shares(min(count, left), sizes, sizes)
        if count > left:
            later = windows.still[windows.number]
            later[[window.start for window in windows.frames]] = False
            spare = top_k(attention.flatten()[None], [count - left], later.flatten()[None])
            none = spare.view_as(attention)
        return Plan(shares[: len(still)], shares[len(still) :], none)


@dataclass(frozen=True)
class Plan:
    """How many tokens of a video stay.

    Attributes:
        means: Of every window, how many clusters the means of its still places become.
        rest: Of every frame, how many of its other tokens.
        spare: (T, N) bool, still tokens that stay as they are and count in no mean.
    """

    means: list[int]
    rest: list[int]
    spare: Tensor


@dataclass(frozen=True)
class Windows:
    """Consecutive frames in which the same places stand still.

    Attributes:
        frames: The frames of each of the W windows, in order.
        still: (W, N) bool, the places whose tokens hardly change in all of them; none in a window
            of one frame.
        number: (T,) in which window every frame is.
    """

    frames: list[range]
    still: Tensor
    number: Tensor

    def means(self, tokens: Tensor, spare: Tensor) -> Tensor:
        """(W, N, D) the means over the frames of every window, at least float32.

        Args:
            tokens: (T, N, D).
            spare: (T, N) bool, True at tokens that are left out, at most all but one.
        """
        wide, counted = widened(tokens), ~spare[..., None]
        found = []
        for window in self.frames:
            inside = slice(window.start, window.stop)
            total = (wide[inside] * counted[inside]).sum(0)
            found.append(total / counted[inside].sum(0))
        return torch.stack(found)


def still_windows(still: Tensor, longest: int) -> Windows:
    """The windows of a video: see `best_windows`."""
    frames = best_windows(still, longest)
    places = [still[window.start : window.stop - 1].all(0) & (len(window) > 1) for window in frames]
    number = [i for i, window in enumerate(frames) for _ in window]
    return Windows(frames, torch.stack(places), torch.tensor(number, device=still.device))


def clustered(
    means: Tensor, still: Tensor, counts: Sequence[int], neighbours: int, beta: float | None
) -> tuple[Tensor, Tensor]:
    """Clusters of the tokens of every window.

    Args:
        means: (W, N, D) tokens.
        still: (W, N) bool, which of them there are.
        counts: How many clusters to make of every window.
        neighbours: Nearest tokens that make one dense, at most as many as there are clusters.
        beta: Weight of a centre beside the mean of the others; None takes the mean of all.

    Returns:
        (W, N) bool, the centres, and (W, N, D) with the clusters' states at them.
    """
    chosen, merged = torch.zeros_like(still), means.clone()
    if not any(counts):
        return chosen, merged
    near_by = [min(neighbours, count) for count in counts]
    cluster, centres = density_peaks(means, counts, still, neighbours=near_by)
    slots = torch.arange(centres.shape[1], device=centres.device)
    real = slots < torch.tensor(counts, device=centres.device)[:, None]
    rows = torch.arange(len(means), device=centres.device)[:, None].expand_as(centres)[real]
    chosen[rows, centres[real]] = True
    members = still if beta is None else still & ~chosen
    group, sizes = group_means(means, cluster, members, centres.shape[1])
    group, alone = group[real], sizes[real][:, None] == 0
    centre = means[rows, centres[real]]
    if beta is not None:
        group = torch.where(alone, centre, beta * centre + (1 - beta) * group)
    merged[rows, centres[real]] = group
    return chosen, merged


def halved(states: Tensor, kept: Tensor) -> Tensor:
    """Merge every token that goes into the most similar one that stays.

    One after the other, in their order: what stays becomes the mean of itself and the token that
    goes, so that later ones weigh more, the last as much as all before it. Similarities are those
    of the states as they come.

    Args:
        states: (n, D) states of the tokens.
        kept: (n,) bool, those that stay; at least one.

    Returns:
        (n, D) the states; of those that go, as they were.
    """
    wide = widened(states)
    target = cosine(wide[None, ~kept], wide[None, kept])[0].argmax(-1)
    joins = one_hot(target, int(kept.sum()))
    after = joins.flip(0).cumsum(0).flip(0)  # how many join from each on, itself included
    weights = torch.where(joins > 0, 0.5**after, 0.0).to(wide.dtype)
    own = 0.5 ** joins.sum(0).to(wide.dtype)
    merged = states.clone()
    merged[kept] = (own[:, None] * wide[kept] + weights.mT @ wide[~kept]).to(states.dtype)
    return merged


@torch.no_grad()
def place_similarity(tokens: Tensor) -> Tensor:
    """(T - 1, N) the cosines of (T, N, D) tokens to those at their place in the next frame."""
    wide = widened(tokens)
    similarity = cosine_similarity(wide[:-1], wide[1:], dim=-1)
    check_finite(similarity, what="Tokens of frames")
    return similarity


def best_windows(still: Tensor, longest: int) -> list[range]:
    """Cut a video so that as many tokens as possible repeat what stood there before.

    In a window of L frames where n places stand still all the time, (L - 1) n tokens do. The sum
    is the largest possible, found by dynamic programming over the last frame; of equal choices for
    a last frame the shortest window counts.

    Args:
        still: (T - 1, N) bool, whether a token is still in the next frame.
        longest: Frames of a window at most.

    Returns:
        The frames of every window, in order.
    """
    frames = len(still) + 1
    best, starts = [0] * (frames + 1), [0] * frames  # best[i]: of the frames before i
    still = still.cpu()  # a loop over frames with a few numbers in each
    run = still.new_zeros(still.shape[1], dtype=torch.long)
    for last in range(frames):
        best[last + 1], starts[last] = best[last], last
        if last == 0:
            continue
        run = (run + 1) * still[last - 1]
        # Of every length, at how many places so many frames, or more, stand still up to this one.
        lasting = torch.bincount(run, minlength=frames).flip(0).cumsum(0).flip(0).tolist()
        for length in range(2, min(last + 1, longest) + 1):
            first = last + 1 - length
            value = best[first] + lasting[length - 1] * (length - 1)
            if value > best[last + 1]:
                best[last + 1], starts[last] = value, first
    found = []
    stop = frames
    while stop > 0:
        found.append(range(starts[stop - 1], stop))
        stop = starts[stop - 1]
    return found[::-1]
