"""Videos: frames that were chosen from a file, an animated picture or a folder of pictures."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageSequence

from pore._files import shown
from pore._images import open_image
from pore.errors import InputError

VIDEO_FILES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
"""How the names of files end that are videos."""

ANIMATED_FILES = (".apng", ".gif", ".webp")
"""How the names of pictures end that may be animated."""

_PICTURES = (".avif", ".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Video:
    """Frames of a video, in order.

    Attributes:
        frames: The frames in RGB, all of one size.
        numbers: Which frame of the whole video each is, counted from 0.
        rate: Frames of the whole video per second; None where it has no clock.
    """

    frames: tuple[PIL.Image.Image, ...]
    numbers: tuple[int, ...]
    rate: float | None = None

    def __post_init__(self) -> None:
        sizes = {frame.size for frame in self.frames}
        if len(sizes) != 1 or len(self.frames) != len(self.numbers):
            raise InputError(
                "The frames of a video are one or more of one size, with a number each; these are "
                f"{len(self.frames)} of sizes {sorted(sizes)}, with {len(self.numbers)} numbers."
            )


@dataclass(frozen=True)
class VideoFile:
    """A video on disk, whose frames are taken when they are needed.

    Attributes:
        path: As `read_video` takes it.
        frames: How many frames to take.
    """

    path: Path
    frames: int = 8

    def read(self) -> Video:
        """Its frames.

        Raises:
            InputError: As `read_video`.
        """
        return read_video(self.path, self.frames)


def is_video(path: Path) -> bool:
    """Whether a path is a video: by its name, or as a folder or a picture of several frames."""
    if path.is_dir() or path.suffix.lower() in VIDEO_FILES:
        return True
    if path.suffix.lower() not in ANIMATED_FILES:
        return False
    try:
        with PIL.Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1
    except (OSError, ValueError):  # whoever opens it says what is wrong
        return False


def read_video(path: str | os.PathLike[str], frames: int) -> Video:
    """Frames of a video at equal distances, from the first to the last.

    Args:
        path: A video that FFmpeg decodes; a GIF, PNG or WebP that is animated; or a folder of
            pictures, which are frames in the order of the numbers in their names.
        frames: How many frames; a shorter video gives all that it has.

    Returns:
        The video. Frames of a folder are brought to the size of the first.

    Raises:
        InputError: It cannot be read, or the decoder is not installed.
    """
    if frames < 1:
        raise InputError(f"A video has at least 1 frame, not {frames}.")
    file = Path(path)
    if not file.exists():
        raise InputError(f"There is no file or folder {shown(file)}.")
    try:
        if file.is_dir():
            return _of_folder(file, frames)
        if file.suffix.lower() in ANIMATED_FILES:
            return _of_picture(file, frames)
        return _of_file(file, frames)
    except InputError as error:
        raise InputError(f"The video {shown(file)} cannot be read: {error}") from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"The video {shown(file)} cannot be read: {why}") from error


def chosen(count: int, frames: int) -> tuple[int, ...]:
    """Which of so many frames are taken: the first, the last, and others at equal distances."""
    if frames >= count:
        return tuple(range(count))
    if frames == 1:
        return (count // 2,)
    return tuple(round(i * (count - 1) / (frames - 1)) for i in range(frames))


def _of_folder(folder: Path, frames: int) -> Video:
    """The pictures of a folder."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in _PICTURES]
    if not files:
        raise InputError("there are no pictures in the folder.")
    files.sort(key=lambda file: [int(n) for n in re.findall(r"\d+", file.stem)] + [file.name])
    numbers = chosen(len(files), frames)
    opened = [open_image(files[number]) for number in numbers]
    size = opened[0].size
    return Video(tuple(each.resize(size) for each in opened), numbers)


def _of_picture(file: Path, frames: int) -> Video:
    """The pictures of an animation, each as long as on average."""
    with PIL.Image.open(file) as image:
        count = getattr(image, "n_frames", 1)
        numbers = chosen(count, frames)
        taken, lasts = [], 0.0
        for number, each in enumerate(PIL.ImageSequence.Iterator(image)):
            lasts += each.info.get("duration", 0)
            if number in numbers:
                taken.append(open_image(each.copy()))
    return Video(tuple(taken), numbers, 1000 * count / lasts if lasts else None)


def _decoder() -> Any:
    try:
        import av
    except ImportError as error:
        raise InputError(
            "Reading videos needs PyAV: pip install 'pore-vlm[video]'. A GIF or a folder of "
            "pictures needs nothing."
        ) from error
    return av


def _of_file(file: Path, frames: int) -> Video:
    """Frames that FFmpeg decodes: the file is read once to count them, and once to take some."""
    av = _decoder()
    try:
        count = sum(1 for _ in _decoded(av, file))
        if not count:
            raise InputError("there is no picture in it.")
        numbers = chosen(count, frames)
        taken = [
            frame.to_image() for i, frame in enumerate(_decoded(av, file)) if i in set(numbers)
        ]
        with av.open(str(file)) as container:
            rate = container.streams.video[0].average_rate
    except av.FFmpegError as error:
        raise InputError(f"FFmpeg says: {error.strerror}.") from error
    return Video(tuple(taken), numbers[: len(taken)], None if rate is None else float(rate))


def _decoded(av: Any, file: Path) -> Iterator[Any]:
    """The frames of the first video stream of a file."""
    with av.open(str(file)) as container:
        if not container.streams.video:
            raise InputError("there is no video in it.")
        yield from container.decode(video=0)


def stacked(videos: Sequence[Video]) -> list[Any]:
    """(T, H, W, 3) uint8 arrays of the frames of videos."""
    import numpy as np

    return [np.stack([np.asarray(frame) for frame in video.frames]) for video in videos]
