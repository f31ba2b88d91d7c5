"""Processors of videos: how they are loaded and called, and one that needs no torchvision.

The video processors of transformers are built on torchvision, without which a whole processor
cannot be loaded, though its images need none."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

FRAME_BY_FRAME = frozenset({"LlavaNextVideoProcessor"})
"""Processors whose video processor does to every frame what CLIP's does to an image."""

_NOT_OF_CLIP = ("video_processor_type", "do_sample_frames", "return_metadata")


def load_processor(path: str, revision: str | None = None) -> Any:
    """The processor of a checkpoint, for images also where torchvision is missing.

    Without torchvision it has no video processor, or, where frames are treated like images, one
    that does the same by Pillow.

    Args:
        path: Folder or hub id.
        revision: Branch, tag or commit on the hub.
    """
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    # In the top module of older versions it stands for one that needs torchvision.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
    from transformers.utils import is_torchvision_available

    kind = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(path, revision=revision)), None)
    wants = () if kind is None else inspect.signature(kind.__init__).parameters
    if is_torchvision_available() or "video_processor" not in wants:
        return AutoProcessor.from_pretrained(path, revision=revision)
    settings, _ = kind.get_processor_dict(path, revision=revision)
    own = {name: settings[name] for name in wants if name in settings}
    found = None
    if kind.__name__ in FRAME_BY_FRAME and "video_processor" in own:
        found = FramesAsImages(own["video_processor"])
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(path, revision=revision),
        "tokenizer": AutoTokenizer.from_pretrained(path, revision=revision),
        "video_processor": found,
    }
    return _unchecked(kind)(**own | parts)


def _unchecked(kind: type[Any]) -> type[Any]:
    """A class of processors that takes any video processor, and None, under the same name."""

    def check(self: Any, argument_name: str, argument: Any) -> Any:
        if argument_name != "video_processor":
            return kind.check_argument_for_proper_class(self, argument_name, argument)
        return None

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})


class FramesAsImages:
    """A video processor that resizes, crops and normalises every frame as CLIP does an image.

    Args:
        settings: Those of the video processor that it stands in for.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        known = {name: value for name, value in settings.items() if name not in _NOT_OF_CLIP}
        self._images = CLIPImageProcessorPil(**known)

    def __call__(self, videos: Sequence[Any], **kwargs: Any) -> dict[str, Any]:
        """Pixels (V, T, 3, H, W) of V videos (T, H, W, 3) of as many frames."""
        made = [self._images(list(video), return_tensors="pt")["pixel_values"] for video in videos]
        return {"pixel_values_videos": torch.stack(made)}


def video_arguments(
    videos: Sequence[np.ndarray], indices: Sequence[Sequence[int]], rates: Sequence[float | None]
) -> dict[str, Any]:
    """What a processor is called with for videos whose frames were chosen already.

    Some models write the times of frames into the prompt, which are `indices` over the rate.

    Args:
        videos: (T, H, W, 3) uint8, one for each video.
        indices: The numbers that the frames had in their files.
        rates: Frames per second of the files, None where there is none.
    """
    known = [
        {
            "total_num_frames": max(numbers) + 1,
            "fps": rate,
            "frames_indices": list(numbers),
            "height": video.shape[1],
            "width": video.shape[2],
        }
        for video, numbers, rate in zip(videos, indices, rates, strict=True)
    ]
    return {"videos": list(videos), "video_metadata": known, "do_sample_frames": False}
