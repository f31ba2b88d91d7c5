"""Videos for tests: what a stage sees of them, and which of their tokens stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pore.engine.stages import View
from pore.layout import Image, Layout, Tiling


def video_view(videos: Sequence[Tensor], before: int = 2) -> View:
    """What a stage on the embeddings sees of videos (T, N, D), each in a prompt of its own.

    Args:
        videos: The tokens of every video.
        before: Text tokens before each; two more come after it.
    """
    counts = [frames * size for frames, size, _ in (video.shape for video in videos)]
    length = before + max(counts) + 2
    images = [
        Image(row, 0, range(before, before + count), tiling=tiling(*video.shape[:2]))
        for row, (video, count) in enumerate(zip(videos, counts, strict=True))
    ]
    tokens = torch.arange(length) < before + 2 + torch.tensor(counts)[:, None]
    states = videos[0].new_zeros(len(videos), length, videos[0].shape[-1])
    for row, (video, count) in enumerate(zip(videos, counts, strict=True)):
        states[row, before : before + count] = video.flatten(0, 1)
    layout = Layout.of(images, tokens)
    return View(layout, states, None, None, torch.Generator(), norm=nn.Identity())


def tiling(frames: int, size: int) -> Tiling:
    """A video of so many frames of so many tokens."""
    return Tiling(frames, None, size, tuple(range(frames * size)), of_frames=True)
