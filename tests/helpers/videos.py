"""Videos for tests: what a stage sees of them, and which of their tokens stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from pore.engine.stages import View
from pore.layout import Image, Layout, Tiling
from pore.tower.stages import Encoded, TowerAttention


def video_view(
    videos: Sequence[Tensor],
    before: int = 2,
    attention: Sequence[Tensor] | None = None,
    pictures: int = 0,
) -> View:
    """What a stage on the embeddings sees of videos (T, N, D), each in a prompt of its own.

    Args:
        videos: The tokens of every video.
        before: Text tokens before each; two more come after it.
        attention: (T, N) what those of every video get in the vision tower, of any kind.
        pictures: How many of them, at the end, are no videos but images.
    """
    counts = [frames * size for frames, size, _ in (video.shape for video in videos)]
    length = before + max(counts) + 2
    moving = len(videos) - pictures
    images = [
        Image(
            row,
            0,
            range(before, before + count),
            tiling=tiling(*video.shape[:2]),
            of_video=row < moving,
        )
        for row, (video, count) in enumerate(zip(videos, counts, strict=True))
    ]
    tokens = torch.arange(length) < before + 2 + torch.tensor(counts)[:, None]
    states = videos[0].new_zeros(len(videos), length, videos[0].shape[-1])
    for row, (video, count) in enumerate(zip(videos, counts, strict=True)):
        states[row, before : before + count] = video.flatten(0, 1)
    layout = Layout.of(images, tokens)
    seen = None
    if attention is not None:
        every = [dict.fromkeys(get_args(TowerAttention), weights[:, None]) for weights in attention]
        seen = tuple(map(Encoded, videos, videos, every))
    return View(layout, states, None, None, torch.Generator(), norm=nn.Identity(), tower=seen)


def tiling(frames: int, size: int) -> Tiling:
    """A video of so many frames of so many tokens."""
    return Tiling(frames, None, size, tuple(range(frames * size)), of_frames=True)


def decoder_view(states: Tensor, attention: Tensor, start: int, count: int) -> View:
    """What a stage in the decoder sees of a video in a prompt.

    Args:
        states: (1, L, D) the states that enter the layer.
        attention: (1, H, L) the last token's attention in the layer before.
        start: Where the video's tokens begin.
        count: How many it has; here of two frames, of which some tokens may be gone.
    """
    image = Image(0, 0, range(start, start + count), tiling=tiling(2, count), of_video=True)
    layout = Layout.of([image], torch.ones(states.shape[:2], dtype=torch.bool))
    seen = layout.gather(attention.mean(1)[..., None])[..., 0]
    return View(layout, states, seen, None, torch.Generator(), norm=nn.Identity())
