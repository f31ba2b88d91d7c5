"""What methods share that choose among the frames of a video."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from pore.cost.shapes import ModelShape
from pore.engine.pruner import Pruner
from pore.engine.stages import Selection, Stage, View
from pore.errors import BudgetError, InputError
from pore.layout import Layout
from pore.methods.scorer import BudgetPruner
from pore.tensors.selection import budget


@dataclass(frozen=True)
class Video:
    """Where the tokens of a video lie in a layout: T frames of N tokens each.

    Attributes:
        sample: Which sample of the batch it belongs to.
        images: (T, 1) which image of the layout each frame is, or is part of.
        slots: (T, N) where its tokens are among that image's.
    """

    sample: int
    images: Tensor
    slots: Tensor

    def of(self, values: Tensor) -> Tensor:
        """(T, N, ...) of the (I, t, ...) values of a layout."""
        return values[self.images, self.slots]


def videos(layout: Layout, images_as_frames: bool = False) -> list[Video]:
    """The videos of a layout; an image is a video of one frame.

    Args:
        layout: Where visual tokens lie. All tokens of its videos must still be there.
        images_as_frames: Whether all images of a sample are the frames of one video.

    Returns:
        The videos, by sample and then by place.

    Raises:
        InputError: Tokens of a video are hidden or dropped; or images that are said to be frames
            have different numbers of tokens, or are videos themselves.
    """
    found = []
    for i, image in enumerate(layout.images):
        slots = layout.valid[i].nonzero()[:, 0]
        if image.frames > 1 and len(slots) != image.count:
            raise InputError(
                f"Image {image.index} of sample {image.row} is a video of {image.count} visual "
                f"tokens, of which {len(slots)} are here; frames can be compared only where no "
                "token was dropped before or is hidden by the attention mask."
            )
        owners = torch.full((image.frames, 1), i, device=slots.device)
        found.append(Video(image.row, owners, slots.view(image.frames, -1)))
    return _joined(found) if images_as_frames else found


def _joined(found: Sequence[Video]) -> list[Video]:
    """One video for every sample, of the images that it has."""
    joined = []
    for sample, some in groupby(found, key=lambda video: video.sample):
        frames = list(some)
        sizes = [video.slots.numel() for video in frames]
        if len(set(sizes)) > 1 or any(len(video.slots) > 1 for video in frames):
            raise InputError(
                f"The images of sample {sample} have {sizes} visual tokens; with "
                "images_as_frames=True each is a frame of one video, so that all must have as many."
            )
        images, slots = ([getattr(v, name) for v in frames] for name in ("images", "slots"))
        joined.append(Video(sample, torch.cat(images), torch.cat(slots)))
    return joined


@dataclass(frozen=True)
class OfVideos(BudgetPruner):
    """A method on the embeddings for which all tokens of a video have one budget.

    A subclass defines `name` and `stages`. A method that only compares frames sets
    `videos_only = True`: images beside a video then stay whole, and prompts without a video are
    refused.

    Attributes:
        keep: Tokens kept per video (int), or the fraction kept (float). An image is a video of one
            frame.
        images_as_frames: Whether all images of a sample are the frames of one video, as where a
            processor hands frames over as images (InternVL, SmolVLM). `keep` is then of the video.
    """

    images_as_frames: bool = False

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> Pruner | None:
        """None where images stay whole: `keep` is of an image here."""
        return None if cls.videos_only else super().usual(keep, shape)

    def kept(self, frames: int, size: int) -> int:
        """How many tokens stay of a video, known before the model sees it.

        Args:
            frames: Its number of frames T.
            size: The number of tokens N of each.

        Raises:
            BudgetError: So few cannot be kept, or the number depends on what the video shows.
        """
        return budget(self.keep, frames * size)

    def share(self, frames: int, size: int) -> float:
        """The fraction of a video's tokens that `keep` means.

        Args:
            frames: Its number of frames T.
            size: The number of tokens N of each.

        Raises:
            BudgetError: More tokens are asked for than there are.
        """
        total = frames * size
        return budget(self.keep, total) / total if isinstance(self.keep, int) else self.keep

    def to_choose(self, layout: Layout) -> tuple[list[Video], Tensor]:
        """The videos to choose among, and (I, t) bool, True at images that stay whole.

        Raises:
            InputError: There are only images, and the method is for videos alone; or a video is not
                complete.
        """
        whole, found = torch.zeros_like(layout.valid), videos(layout, self.images_as_frames)
        if not self.videos_only:
            return found, whole
        moving = [video for video in found if self._moves(video, layout)]
        if not moving:
            raise InputError(
                f"{self.name} compares the frames of a video, and there are only images here; use "
                "another method, or images_as_frames=True if they are frames."
            )
        for video in found:
            if not self._moves(video, layout):
                whole[video.images, video.slots] = True
        return moving, whole

    def _moves(self, video: Video, layout: Layout) -> bool:
        """Whether it is a video, and be it of one frame, and no image."""
        return self.images_as_frames or layout.images[int(video.images[0, 0])].of_video


@contextmanager
def naming(video: Video) -> Iterator[None]:
    """Say of which sample a budget is that cannot be met."""
    try:
        yield
    except BudgetError as error:
        raise BudgetError(f"A video of sample {video.sample}: {error}") from None


@dataclass(frozen=True)
class VideoPruner(OfVideos):
    """A method that chooses on the embeddings among all tokens of a video.

    A subclass defines `name` and `choose`.

    Attributes:
        keep: Tokens kept per video (int), or the fraction kept (float). An image is a video of one
            frame.
        images_as_frames: Whether all images of a sample are the frames of one video, as where a
            processor hands frames over as images (InternVL, SmolVLM). `keep` is then of the video.
    """

    @abstractmethod
    def choose(self, tokens: Tensor) -> Tensor:
        """What stays of a video.

        Args:
            tokens: (T, N, D) the tokens of its frames, as they enter the decoder.

        Returns:
            (T, N) bool, True at what stays.

        Raises:
            BudgetError: So few tokens cannot be kept.
        """

    def stages(self) -> Sequence[Stage]:
        """One stage, on the embeddings."""
        return [Stage(0, self._select)]

    def _select(self, view: View) -> Selection:
        found, kept = self.to_choose(view.layout)
        features = view.features
        for video in found:
            with naming(video):
                kept[video.images, video.slots] = self.choose(video.of(features))
        return Selection(kept)
