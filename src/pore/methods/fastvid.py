"""FastVID: the most attended tokens of every frame, and centres that the others merge into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import one_hot

from pore.bias.where import Positions
from pore.errors import BudgetError
from pore.methods._checks import check_choice, check_share, check_whole
from pore.methods._merging_videos import Frames, Merged, MergingVideoPruner
from pore.methods._segments import frame_similarity, runs, segments
from pore.tensors.clustering import density_peaks
from pore.tensors.gathering import unit, widened
from pore.tensors.selection import budget, even_shares, top_k
from pore.tower.stages import TowerAttention

Variant = Literal["onevision", "llava-video", "qwen"]

_THRESHOLD_OF_HEAD, _THRESHOLD = 0.9, 0.84
"""The authors' `tau` with a pooling head, and without."""
_NEIGHBOURS = 4
"""How many tokens of a frame, itself included, say how densely others lie around one."""


@dataclass(frozen=True)
class FastVID(MergingVideoPruner):
    """Keep attended tokens, and merge the others into dense ones (FastVID, arXiv 2503.11187).

    The video is cut into segments where frames differ: at the `segments` - 1 least similar pairs of
    neighbours, and wherever their similarity is below `tau`. In every frame of a segment the tokens
    with the most attention in the vision tower stay as they are. A share of the budget, `context`,
    goes to anchor frames, the last of a segment and every `spacing`-th before it: those of their
    other tokens that lie densest, and far from denser ones (density peaks), stay too. All other
    tokens of the segment go to the most similar of these in each of its anchor frames. A token with
    n such members becomes w times itself plus 1 - w times their mean, w = max(1 / (n + 1), beta).
    So every anchor frame takes in the whole segment, and the cost grows with the square of a
    segment's frames.

    Frames are compared by the vector, and tokens ranked by the attention, of the pooling head of a
    SigLIP tower. Other towers have none; there it is done as in the authors' code for Qwen2.5-VL:
    the mean of a frame's tokens, and the attention of the mean query of a frame.

    It acts on the embeddings; tokens keep their places and positions. Images beside a video stay
    whole. The authors' three codes count differently, and none meets a budget exactly. Here the
    budget is shared out evenly, and merging is that of their code for LLaVA-Video.

    Attributes:
        keep: Tokens kept per video (int), or the fraction kept (float).
        images_as_frames: Whether all images of a sample are the frames of one video, as where a
            processor hands frames over as images (InternVL, SmolVLM). `keep` is then of the video.
        segments: Segments to cut a video into at least (c in the paper).
        tau: Similarity of neighbouring frames below which a segment ends. None is what the authors
            use: 0.9 with a pooling head, 0.84 without.
        context: Share of the budget for the context tokens of anchor frames (d).
        spacing: Every so many frames of a segment, from its last, there is an anchor (p).
        beta: The least weight that a context token has in its merged one.
        faithful: Do as the authors' code: `keep` is a number of tokens or a fraction of a frame,
            rounded down, which a frame keeps on average or less.
        variant: Which of their codes that is. In "onevision" every frame keeps as many attended
            tokens; a context token is its own member; what is left of the division among anchors
            is lost. "qwen" lets only the last frame of a run of still ones keep tokens, at least
            one of a segment for context; a frame's context is at most half of it, and what does not
            fit is lost.
        still: Similarity from which on neighbouring frames are one run, in "qwen" alone.
    """

    segments: int = 8
    tau: float | None = None
    context: float = 0.4
    spacing: int = 4
    beta: float = 0.6
    variant: Variant = "onevision"
    still: float = 0.95

    name: ClassVar[str] = "FastVID"
    paper: ClassVar[str] = "arXiv 2503.11187"
    attends: ClassVar[TowerAttention] = "pooled"
    positions: ClassVar[Positions] = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(1, segments=self.segments, spacing=self.spacing)
        check_share(context=self.context, beta=self.beta)
        check_choice(Variant, variant=self.variant)
        if self.variant != "onevision" and not self.faithful:
            raise BudgetError(
                f'variant="{self.variant}" says which of the authors\' codes to follow; set '
                "faithful=True for that."
            )

    def merge(self, video: Frames) -> Merged:
        """Attended tokens and merged ones."""
        features, tau = video.pooled, self.tau
        if features is None:
            features = widened(video.tokens).mean(1)
        if tau is None:
            tau = _THRESHOLD if video.pooled is None else _THRESHOLD_OF_HEAD
        plan = self._plan(features, segments(features, tau, self.segments), video.tokens.shape[1])
        return dense_merging(video, plan, self.beta)

    def _plan(self, features: Tensor, parts: Sequence[range], size: int) -> Plan:
        """How many of the N tokens of every frame stay, of segments of (T, F) features."""
        if not self.faithful:
            count = self.kept(len(features), size)
            return exact_plan(count, size, parts, self.context, self.spacing)
        each = budget(self.keep, size) if isinstance(self.keep, int) else int(size * self.keep)
        if each < 1:
            raise BudgetError(
                f"keep={self.keep} of {size} tokens of a frame rounds down to none; keep more."
            )
        if self.variant == "onevision":
            return onevision_plan(each, parts, self.context, self.spacing)
        if self.variant == "llava-video":
            return segment_plan(each, size, parts, self.context, self.spacing)
        ends = {run[-1] for run in runs(frame_similarity(features) < self.still)}
        return segment_plan(each, size, parts, self.context, self.spacing, ends)


@dataclass(frozen=True)
class Plan:
    """How many tokens every frame of a video keeps, and what merges where.

    Attributes:
        salient: Of every frame, how many of the most attended tokens stay as they are.
        context: Of every frame, how many others stay and take in more; 0 but in anchor frames.
        pools: Of every frame, the frames whose tokens merge into its context.
        itself: Whether a context token is among those that may merge into it.
    """

    salient: list[int]
    context: list[int]
    pools: list[range]
    itself: bool = False

    @classmethod
    def of(cls, parts: Sequence[range], itself: bool = False) -> Plan:
        """A plan that keeps nothing yet, with segments as pools."""
        frames = parts[-1].stop
        return cls([0] * frames, [0] * frames, [part for part in parts for _ in part], itself)


def exact_plan(count: int, size: int, parts: Sequence[range], share: float, spacing: int) -> Plan:
    """A plan that keeps exactly so many tokens.

    Args:
        count: Tokens to keep of the whole video.
        size: Tokens N of a frame.
        parts: The frames of every segment.
        share: Share of a segment's budget that goes to its anchor frames as context; less where
            they have no room.
        spacing: Every so many frames of a segment, from its last, there is an anchor.
    """
    plan = Plan.of(parts)
    budgets = even_shares(count, [size] * parts[-1].stop)
    for part in parts:
        total = sum(budgets[part.start : part.stop])
        context, room, anchors = int(total * share), [0], part[::-1][::spacing]
        while True:
            salient = even_shares(total - context, [size] * len(part))
            room = [size - salient[frame - part.start] for frame in anchors]
            if context <= sum(room):
                break
            context = sum(room)
        plan.salient[part.start : part.stop] = salient
        for frame, some in zip(anchors, even_shares(context, room), strict=True):
            plan.context[frame] = some
    return plan


def onevision_plan(each: int, parts: Sequence[range], share: float, spacing: int) -> Plan:
    """The plan of the authors' code for LLaVA-OneVision.

    Args:
        each: Tokens kept of a frame, on average or less.
        parts: The frames of every segment.
        share: Share of them that is context.
        spacing: Every so many frames of a segment, from its last, there is an anchor.
    """
    plan = Plan.of(parts, itself=True)
    context = int(each * share)
    plan.salient[:] = [each - context] * len(plan.salient)
    for part in parts:
        anchors = part[::-1][::spacing]
        some = context * len(part) // len(anchors)
        for frame in anchors:
            plan.context[frame] = some
            if some == context:  # as in segments of a single frame
                plan.pools[frame] = range(frame, frame + 1)
    return plan


def segment_plan(
    each: int,
    size: int,
    parts: Sequence[range],
    share: float,
    spacing: int,
    ends: set[int] | None = None,
) -> Plan:
    """The plan of the authors' codes for LLaVA-Video and Qwen2.5-VL.

    Args:
        each: Tokens kept of a frame, on average or less.
        size: Tokens N of a frame.
        parts: The frames of every segment.
        share: Share of a segment's tokens that is context.
        spacing: Of the frames that keep tokens, every so many, from the last, there is an anchor.
        ends: For Qwen2.5-VL, the last frame of every run of still frames; None for LLaVA-Video.
    """
    plan = Plan.of(parts)
    for part in parts:
        takers = [frame for frame in part if ends is None or frame in ends or frame == part[-1]]
        anchors = takers[::-1][::spacing]
        total = each * len(part)
        context = max(int(total * share), 0 if ends is None else 1)
        shares = even_shares(context, [context] * len(anchors))
        for frame, some in zip(anchors, shares, strict=True):
            plan.context[frame] = some
        left = total - context
        for frame, some in zip(takers, even_shares(left, [left] * len(takers)), strict=True):
            plan.salient[frame] = some
        if ends is not None and len(part) > 1:
            for frame in takers:
                plan.context[frame] = min(plan.context[frame], size // 2)
                plan.salient[frame] = min(plan.salient[frame], size - plan.context[frame])
    return plan


def dense_merging(video: Frames, plan: Plan, beta: float) -> Merged:
    """Keep the most attended tokens of every frame, and merge the others into dense ones.

    Args:
        video: The video.
        plan: How many tokens stay, and what merges where.
        beta: The least weight that a token has in what it becomes.

    Returns:
        What stays, in raster order.

    Raises:
        BudgetError: A frame has fewer tokens than its context needs.
    """
    tokens, size = video.tokens, video.tokens.shape[1]
    salient = top_k(video.attention, plan.salient)
    keep, merged = salient.clone(), tokens.clone()
    anchors = [frame for frame, some in enumerate(plan.context) if some]
    for frame in anchors:
        if plan.salient[frame] + plan.context[frame] > size:
            raise BudgetError(
                f"The authors' code keeps {plan.salient[frame]} attended tokens and "
                f"{plan.context[frame]} for context of a frame of {size}; keep fewer, or use "
                "faithful=False."
            )
    if not anchors:
        return Merged.of(keep, merged)
    counts = [plan.context[frame] for frame in anchors]
    near_by = [_NEIGHBOURS] * len(anchors)
    _, centres = density_peaks(tokens[anchors], counts, ~salient[anchors], neighbours=near_by)
    wide, directions = widened(tokens), unit(tokens).detach()
    for frame, count, chosen in zip(anchors, counts, centres, strict=True):
        pool, targets = plan.pools[frame], chosen[:count].sort().values
        keep[frame, targets] = True
        inside = slice(pool.start, pool.stop)
        members = ~salient[inside].flatten()
        if not plan.itself:
            members[(frame - pool.start) * size + targets] = False
        likeness = directions[inside].flatten(0, 1) @ directions[frame, targets].mT
        joins = one_hot(likeness.argmax(-1), count) * members[:, None]
        means = joins.mT.to(wide.dtype) @ wide[inside].flatten(0, 1)
        sizes = joins.sum(0)[:, None]
        means = means / sizes.clamp(min=1)
        weight = (1 / (sizes + 1)).clamp(min=beta).masked_fill(sizes == 0, 1.0).to(wide.dtype)
        target = weight * wide[frame, targets] + (1 - weight) * means
        merged[frame, targets] = target.to(tokens.dtype)
    return Merged.of(keep, merged)
