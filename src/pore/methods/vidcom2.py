"""VidCom2: tokens that are unlike the average of their video and of their frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pore.errors import BudgetError
from pore.methods._checks import check_choice
from pore.methods._videos import VideoPruner
from pore.tensors.gathering import inverse, widened
from pore.tensors.selection import by_score, check_finite, top_k, truncated

Counts = Literal["exact", "vllm", "repository"]

_WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
"""Variances of the Gaussians whose sum says how near a token is to a centre."""
_TEMPERATURE = 0.01


@dataclass(frozen=True)
class VidCom2(VideoPruner):
    """Keep tokens unlike the average of their video and frame (arXiv 2505.14454).

    Only the half of the channels with the lowest variance over the video counts, and every token is
    scaled to length 1 there. Its redundancy is how near it is to the mean of the video plus how
    near it is to the mean of its frame, each the sum of five Gaussians. A frame whose tokens are
    far from the mean of the video gets more of the budget than others: with the authors'
    temperature, nearly always one frame gets more, and the others a little less. In every frame the
    least redundant tokens stay.

    These numbers are rounded frame by frame. Where they come to less than the budget, the least
    redundant of all other tokens are added; where they come to more, the most redundant of those
    that were to stay go, so that a frame can lose all of its tokens.

    It acts on the embeddings. An image is a video of one frame.

    Attributes:
        keep: Tokens kept per video (int), or the fraction kept (float).
        images_as_frames: Whether all images of a sample are the frames of one video, as where a
            processor hands frames over as images (InternVL, SmolVLM). `keep` is then of the video.
        counted: How many tokens stay of a video: "exact" as many as `keep` means; "vllm" the same,
            rounded down as vLLM does where its `video-pruning-rate` is 1 - keep, but at least one
            for every frame; "repository" what the rounded numbers of
            the frames come to, at least one each, which depends on what the video shows.
    """

    counted: Counts = "exact"

    name: ClassVar[str] = "VidCom2"
    paper: ClassVar[str] = "arXiv 2505.14454"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(Counts, counted=self.counted)

    def kept(self, frames: int, size: int) -> int:
        """The budget; vLLM's is at least a token for every frame."""
        if self.counted == "repository":
            raise BudgetError(
                'With counted="repository" it depends on the video how many tokens stay; use '
                '"exact" or "vllm" for a number that is known in advance.'
            )
        if self.counted == "exact":
            return super().kept(frames, size)
        return max(frames, truncated(self.keep, frames * size))

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image, a video of one frame, that enter every decoder layer."""
        return [self.kept(1, visual)] * layers

    def choose(self, tokens: Tensor) -> Tensor:
        """The least redundant tokens of every frame."""
        share = self.share(*tokens.shape[:2])
        of_video, of_frame = redundancy(tokens)
        check_finite(of_video)
        kept = top_k(-(of_video + of_frame), frame_counts(of_video, share))
        if self.counted == "repository":
            return kept
        count = self.kept(*tokens.shape[:2])
        # What was chosen comes first, and within it what is least redundant.
        order = by_score(-(of_video + of_frame).flatten()[None], torch.ones_like(kept).view(1, -1))
        rank = inverse(order)[0] - kept.flatten() * kept.numel()
        return (rank.argsort().argsort() < count).view_as(kept)


def redundancy(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """How near every token is to the mean of its video, and to that of its frame.

    Args:
        tokens: (T, N, D) the tokens of T frames.

    Returns:
        Two (T, N), at least float32.
    """
    tokens = widened(tokens)
    calm = calm_channels(tokens)
    tokens = normalize(tokens[..., calm], dim=-1)
    return nearness(tokens, tokens.mean((0, 1))), nearness(tokens, tokens.mean(1, keepdim=True))


def calm_channels(tokens: Tensor) -> Tensor:
    """(max(1, D // 2),) the channels with the lowest variance over the (T, N, D) tokens."""
    variance = tokens.flatten(0, 1).var(0, correction=0)
    return variance.argsort(stable=True)[: max(1, len(variance) // 2)].sort().values


def nearness(tokens: Tensor, centre: Tensor) -> Tensor:
    """(T, N) the sum of Gaussians of the distance of (T, N, D) tokens to a centre."""
    squares = (tokens - centre).square().sum(-1)
    return torch.stack([torch.exp(-squares / (2 * width)) for width in _WIDTHS]).sum(0)


def frame_counts(of_video: Tensor, share: float) -> Tensor:
    """How many tokens every frame keeps: (T,) whole numbers from 1 to N.

    Args:
        of_video: (T, N) how near every token is to the mean of the video.
        share: Fraction of all tokens to keep.
    """
    return (frame_shares(of_video, share) * of_video.shape[1]).round().clamp(min=1).long()


def frame_shares(of_video: Tensor, share: float) -> Tensor:
    """Which fraction of its tokens every frame would keep, before rounding.

    Args:
        of_video: (T, N) how near every token is to the mean of the video.
        share: Fraction of all tokens to keep.

    Returns:
        (T,) fractions, at most 1.
    """
    unique = -of_video.mean(1)
    weight = ((unique - unique.max()) / _TEMPERATURE).softmax(0)
    return (share * (1 + weight - weight.mean())).clamp(max=1.0)
