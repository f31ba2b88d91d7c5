"""EVS: tokens that differ from what was at their place one frame earlier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pore.errors import BudgetError
from pore.methods._videos import VideoPruner
from pore.tensors.gathering import widened
from pore.tensors.selection import top_k, truncated


@dataclass(frozen=True)
class EVS(VideoPruner):
    """Keep what changes from frame to frame: Efficient Video Sampling (arXiv 2510.14624).

    A token scores one minus its cosine to the token at the same place in the frame before, whether
    or not that one stays. The first frame stays whole, and of the others the tokens with the
    highest scores, in whatever frames they are. How many stay is thus known from the numbers of
    frames and tokens alone.

    It acts on the embeddings, as vLLM's version of it does; the paper compares pixels. Images
    beside a video and videos of one frame stay whole, because all they have is a first frame.

    Attributes:
        keep: Tokens kept per video (int), or the fraction kept (float); at least one frame. vLLM's
            `video-pruning-rate` is 1 - keep.
        images_as_frames: Whether all images of a sample are the frames of one video, as where a
            processor hands frames over as images (InternVL, SmolVLM). `keep` is then of the video.
        faithful: Round as vLLM does: fractions of 1 - `video-pruning-rate` down, and up to a whole
            frame where it is more.
    """

    faithful: bool = False

    name: ClassVar[str] = "EVS"
    paper: ClassVar[str] = "arXiv 2510.14624"
    videos_only: ClassVar[bool] = True

    def kept(self, frames: int, size: int) -> int:
        """The budget, which must be enough for the first frame, or one frame, which stays whole."""
        if frames == 1:
            return size
        if self.faithful:
            return max(size, truncated(self.keep, frames * size))
        count = super().kept(frames, size)
        if count < size:
            raise BudgetError(
                f"keep={self.keep} leaves {count} of {frames} frames of {size} tokens, but the "
                f"first frame stays whole; ask for at least {size}."
            )
        return count

    def choose(self, tokens: Tensor) -> Tensor:
        """The first frame, and what changes most."""
        frames, size = tokens.shape[:2]
        count = self.kept(frames, size)
        change = dissimilarity(tokens).flatten()
        kept = torch.ones(frames * size, dtype=torch.bool, device=tokens.device)
        kept[size:] = top_k(change[None], [count - size])[0]
        return kept.view(frames, size)


def dissimilarity(tokens: Tensor) -> Tensor:
    """(T - 1, N) one minus the cosine of (T, N, D) tokens to those one frame earlier."""
    tokens = widened(tokens)
    return 1 - torch.nn.functional.cosine_similarity(tokens[1:], tokens[:-1], dim=-1)
