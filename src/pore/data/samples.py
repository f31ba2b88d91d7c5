"""A question about an image or a video: what calibration and evaluation both go through.

Images are opened when they are needed, so that a list of samples is small and one bad image is one
bad sample.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from pore._files import shown
from pore._images import open_image
from pore._videos import Video, VideoFile
from pore.errors import InputError

_WHOLE = 1e15  # above it, floats are written with an exponent

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, as shares of the width and the height of an image."""

_THIRDS = ("top", "middle", "bottom")

_MISSING = ("NAType", "NaTType")  # of pandas, which may not be installed


@dataclass(frozen=True)
class Sample:
    """A question about an image or a video.

    Attributes:
        id: Names the sample in messages and reports.
        image: The image, its file, its encoded bytes, a video, the file of one, or None for a
            question without any.
        question: The question, without template and placeholder.
        answer: The right answer, where known. Numbers become text: 3.0 becomes "3", True "True".
            NaN, the missing values of pandas and blank text become None, here and in `kind` and
            `third`. If it is not given, the most frequent one of `answers`.
        kind: Kind of question, for accuracy per kind.
        third: Third of the image that the answer is in ("top", "middle", "bottom"), where known;
            if it is not given, the one that the middle of the box is in.
        box: Where in the image the answer is, where known. Without an `answer` the box is what is
            asked for, and the kind of the question, if it is not given, is "grounding".
        fault: Why it cannot be used, if that was seen when the data set was read.
        answers: All answers that are accepted, such as those of ten people, in their order and as
            often as they were given; missing ones are left out. Empty where there is one, `answer`.
    """

    id: str
    image: PIL.Image.Image | Video | VideoFile | Path | str | bytes | None
    question: str
    answer: str | None = None
    kind: str | None = None
    third: str | None = None
    box: Box | None = None
    fault: str | None = None
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("answer", "kind", "third"):
            try:
                object.__setattr__(self, name, text_of(getattr(self, name)))
            except ValueError as error:
                raise InputError(f"The {name} of sample {self.id} {error}") from error
        try:
            several = answers_of(self.answers)
        except ValueError as error:
            raise InputError(f"The answers of sample {self.id}: one {error}") from error
        if self.answer is None and several:
            object.__setattr__(self, "answer", Counter(several).most_common(1)[0][0])
        object.__setattr__(self, "answers", () if several == (self.answer,) else several)
        if self.box is None:
            return
        try:
            object.__setattr__(self, "box", box_of(self.box))
        except ValueError as error:
            raise InputError(f"The box of sample {self.id} {error}") from error
        if self.third is None:
            middle = (self.box[1] + self.box[3]) / 2
            object.__setattr__(self, "third", _THIRDS[min(int(3 * middle), 2)])
        if self.answer is None and self.kind is None:
            object.__setattr__(self, "kind", "grounding")

    @property
    def accepted(self) -> tuple[str, ...]:
        """The answers that are right: `answers`, or `answer` alone; empty if there are none."""
        return self.answers or answers_of(self.answer)

    def load(self) -> PIL.Image.Image | Video | None:
        """The image or the video, ready for a processor; None for a question without any.

        Raises:
            InputError: As `load_image`.
        """
        if self.fault is None and (self.image is None or isinstance(self.image, Video)):
            return self.image
        if self.fault is None and isinstance(self.image, VideoFile):
            try:
                return self.image.read()
            except InputError as error:
                raise InputError(f"Sample {self.id} cannot be used. {error}") from error
        return self.load_image()

    @property
    def of_video(self) -> bool:
        """Whether it is about a video."""
        return isinstance(self.image, (Video, VideoFile))

    def load_image(self) -> PIL.Image.Image:
        """The whole image as a viewer shows it, in RGB; see `pore._images.open_image`.

        Raises:
            InputError: There is no image; its file is missing, damaged or cut off; its format or
                shape is not supported; or the sample has another fault.
        """
        if self.fault is not None:
            raise InputError(f"Sample {self.id} {self.fault}")
        if isinstance(self.image, str) and is_address(self.image):
            raise InputError(f"Sample {self.id} {fault_of_address(self.image)}")
        if self.image is None:
            raise InputError(f"Sample {self.id} has no image.")
        if isinstance(self.image, (Video, VideoFile)):
            raise InputError(f"Sample {self.id} is about a video, and this is for images.")
        try:
            return open_image(self.image)
        except Exception as error:  # decoders of damaged files raise all kinds of errors
            what = f" {shown(self.image)}" if isinstance(self.image, (str, os.PathLike)) else ""
            why = str(error) if isinstance(error, InputError) else _reason(error)
            raise InputError(
                f"The image{what} of sample {self.id} cannot be read: {why}"
            ) from error


def text_of(value: Any) -> str | None:
    """A text or a number as text, None for a missing value; a ValueError names anything else."""
    if is_missing(value):
        return None
    if isinstance(value, str):
        return value if value.strip() else None
    written = str(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and value.is_integer() and abs(value) < _WHOLE:
        return str(int(value))
    if isinstance(value, int) or (isinstance(value, (float, Decimal)) and math.isfinite(value)):
        return written
    raise ValueError(f"must be a text or a finite number, not {value!r:.60}.")


def answers_of(value: Any) -> tuple[str, ...]:
    """One answer or several as texts, without those that are missing.

    Args:
        value: A text or a number; several of these in a list, a tuple or an array; or, as VQAv2 has
            them, objects with one under "answer", or an object with a list under it.

    Raises:
        ValueError: It is none of these; the message says what one must be.
    """
    if isinstance(value, Mapping) and "answer" in value:
        value = value["answer"]
    several = isinstance(value, (list, tuple)) or getattr(value, "ndim", None) == 1
    texts = (
        text_of(one["answer"] if isinstance(one, Mapping) and "answer" in one else one)
        for one in (value if several else [value])
    )
    return tuple(text for text in texts if text is not None)


def is_address(image: str) -> bool:
    """Whether the name of an image is an address on the network, such as "https://..."."""
    return re.match(r"[a-z][a-z0-9+.-]+://", image, re.IGNORECASE) is not None


def fault_of_address(image: str) -> str:
    """What is wrong with a sample whose image is an address, for `Sample.fault`."""
    return (
        f"has the address {shown(image)!r:.200} in place of an image. pore fetches no images from "
        "the network: download them, and name the files."
    )


def box_of(value: Any) -> Box:
    """Four shares as a box; a ValueError says what they must be."""
    shares = list(value) if isinstance(value, (list, tuple)) else []
    fits = [type(one) in (int, float) and 0 <= one <= 1 for one in shares]
    if len(shares) != 4 or not all(fits) or shares[0] > shares[2] or shares[1] > shares[3]:
        raise ValueError(
            "must be left, top, right and bottom, as shares of the width and the height from 0 to "
            f"1, not {value!r:.60}."
        )
    left, top, right, bottom = map(float, shares)
    return left, top, right, bottom


def is_missing(value: Any) -> bool:
    """Whether a value is None, NaN or one of the missing values of pandas."""
    if value is None or type(value).__name__ in _MISSING:
        return True
    unequal = value != value  # true only for NaN and NaT
    return isinstance(unequal, (bool, np.bool_)) and bool(unequal)


def _reason(error: Exception) -> str:
    """Why a file cannot be read; the message of a decoder's error, with its class."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"
    return f"{type(error).__name__}: {error}"


def noise(size: tuple[int, int], seed: int = 0) -> Sample:
    """A question about a picture of noise, for what depends on the size of the picture alone.

    Args:
        size: Width and height in pixels.
        seed: Seed of the noise.
    """
    shape = (size[1], size[0], 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Sample("noise", PIL.Image.fromarray(pixels), "What is this?")
