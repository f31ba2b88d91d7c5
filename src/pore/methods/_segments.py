"""Videos cut into segments of frames that resemble each other, as several methods do first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pore.tensors.gathering import widened
from pore.tensors.selection import check_finite, top_k


@torch.no_grad()
def segments(features: Tensor, threshold: float, least: int) -> list[range]:
    """The frames of every segment of a video.

    A video is cut between frames whose similarity, the cosine of their features, is below a
    threshold; where that gives too few segments, also between the least similar of the others.

    Args:
        features: (T, F) one vector for every frame.
        threshold: Cut where the similarity is less.
        least: Segments to have at least, as far as there are frames.

    Returns:
        The frames of every segment, in order.

    Raises:
        ScoreError: Features hold NaN or infinity.
    """
    similarity = frame_similarity(features)
    count = max(int((similarity < threshold).sum()), min(least - 1, len(similarity)))
    cut = top_k(-similarity[None], [count])[0]
    return runs(cut)


def frame_similarity(features: Tensor) -> Tensor:
    """(T - 1,) the cosines of (T, F) features of frames to those of the next frame."""
    wide = widened(features)
    check_finite(wide, what="Features of frames")
    return cosine_similarity(wide[:-1], wide[1:], dim=-1)


def runs(cut: Tensor) -> list[range]:
    """The frames of every run, of (T - 1,) bool, True where a frame and the next are parted."""
    ends: Sequence[int] = [*(cut.nonzero()[:, 0] + 1).tolist(), len(cut) + 1]
    return [range(a, b) for a, b in zip([0, *ends], ends, strict=False)]
