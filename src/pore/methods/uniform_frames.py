"""UniformFrames: whole frames at equal distances, the baseline before all methods for videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pore._videos import chosen
from pore.methods._videos import VideoPruner


@dataclass(frozen=True)
class UniformFrames(VideoPruner):
    """Keep whole frames at equal distances, and drop the others.

    It shows what a method gains over taking fewer frames of a video in the first place. Of as many
    frames as the budget needs, the first, the last and others at equal distances stay. Where the
    budget is no whole number of frames, the one in their middle gives the rest: tokens at equal
    distances in reading order.

    It acts on the embeddings. Images beside a video stay whole.

    Attributes:
        keep: Tokens kept per video (int), or the fraction kept (float).
        images_as_frames: Whether all images of a sample are the frames of one video, as where a
            processor hands frames over as images (InternVL, SmolVLM). `keep` is then of the video.
    """

    name: ClassVar[str] = "UniformFrames"
    paper: ClassVar[str] = "baseline"
    videos_only: ClassVar[bool] = True

    def choose(self, tokens: Tensor) -> Tensor:
        """Whole frames, and a part of one."""
        frames, size = tokens.shape[:2]
        count = self.kept(frames, size)
        numbers = list(chosen(frames, -(-count // size)))
        kept = torch.zeros(frames, size, dtype=torch.bool, device=tokens.device)
        kept[numbers] = True
        if rest := count % size:
            middle = numbers[len(numbers) // 2]
            kept[middle] = False
            kept[middle, list(chosen(size, rest))] = True
        return kept
