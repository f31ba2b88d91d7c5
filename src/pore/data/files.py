"""Samples from files: a folder of images and questions to ask, or a JSONL file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pore._files import read_regular, shown
from pore._saved.parsing import parse_json
from pore._videos import VideoFile
from pore.data.samples import (
    Sample,
    answers_of,
    box_of,
    fault_of_address,
    is_address,
    text_of,
)
from pore.errors import InputError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""The file name endings of images in a folder."""

_TEXTS = ("id", "kind", "third")

_LARGEST = 1 << 30  # bytes


def from_folder(
    folder: str | os.PathLike[str], questions: Sequence[str] | str | os.PathLike[str]
) -> list[Sample]:
    """A sample for every image in a folder and the folders in it, in the order of their paths.

    Args:
        folder: The folder. Hidden files, and files without one of the `SUFFIXES`, are left out.
        questions: The questions, or a text file with one on each line; the images take them in
            turn.

    Returns:
        The samples; the id is the path inside the folder.

    Raises:
        InputError: There is no such folder or file, no image or no question.
    """
    root = Path(folder)
    if not os.path.isdir(root):
        raise InputError(f"There is no folder {shown(root)}.")
    if isinstance(questions, (str, os.PathLike)):
        text = _read(Path(questions), "questions")
        questions = [line.strip() for line in text.splitlines() if line.strip()]
    if not questions:
        raise InputError("There is no question to ask about the images.")
    found = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    names = [name for name in found if not any(part.startswith(".") for part in name.split("/"))]
    if not names:
        raise InputError(f"There is no image ({', '.join(SUFFIXES)}) in the folder {root}.")
    return [
        Sample(shown(name), root / name, questions[i % len(questions)])
        for i, name in enumerate(names)
    ]


def from_jsonl(
    path: str | os.PathLike[str],
    *,
    image: str = "image",
    question: str = "question",
    answer: str | None = "answer",
) -> list[Sample]:
    """Samples from a file with one JSON object on each line.

    Each has `question` and `image`, the image's path relative to the file, and may have `answer`,
    `id`, `kind`, `third` and `box`; other keys are ignored. In place of `image` it may have
    `video`, the path of a file or a folder that `read_video` takes, and then `frames`, how many of
    its frames to take (8). Of the first four, numbers and truth values become text; null, NaN, an
    empty list and blank text count as missing. `answer` may be a list of answers that are accepted
    (`Sample.accepted`). `box` is where in the image the answer is: left, top, right and bottom as
    shares of the width and the height. A sample without an id gets the name of the file and the
    number of its line. Images are not fetched from the network: a sample with an address in place
    of a path is a bad one, and a file of nothing else is refused.

    Args:
        path: The file; blank lines are skipped.
        image: Key that stands for `image`.
        question: Key that stands for `question`.
        answer: Key that stands for `answer`; None to have none.

    Returns:
        The samples. Their images are not looked at yet.

    Raises:
        InputError: The file cannot be read or holds no sample, or a line is not as described; the
            message names file and line.
    """
    file = Path(path)
    samples = []
    for number, line in enumerate(_read(file, "samples").split("\n"), 1):
        if line.strip():
            try:
                samples.append(_from_line(line, file, number, (image, question, answer)))
            except ValueError as error:
                raise InputError(f"{shown(file)}, line {number}: {error}") from error
    if not samples:
        raise InputError(f"There is no sample in {file}.")
    if all(isinstance(one.image, str) for one in samples):  # addresses; files are paths
        raise InputError(
            f"{shown(file)}: every sample, such as {samples[0].id}, {samples[0].fault}"
        )
    return samples


def _from_line(line: str, file: Path, number: int, keys: tuple[str, str, str | None]) -> Sample:
    """The sample of a line of a JSONL file; a ValueError says what is wrong with it."""
    image, question, answer = keys
    found = parse_json(line, finite=False)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object.")
    asked = found.get(question)
    if not isinstance(asked, str):
        raise ValueError(f'"{question}" must be a text.')
    texts = {}
    for name in _TEXTS:
        try:
            texts[name] = text_of(None if found.get(name) == [] else found.get(name))
        except ValueError as error:
            raise ValueError(f'"{name}" {error}') from error
    try:
        answers = () if answer is None else answers_of(found.get(answer))
    except ValueError as error:
        raise ValueError(f'"{answer}" {error}') from error
    box = found.get("box")
    try:
        place = None if box is None else box_of(box)
    except ValueError as error:
        raise ValueError(f'"box" {error}') from error
    seen = _seen(found, file.parent, image)
    return Sample(
        texts["id"] or f"{shown(file.name)}:{number}",
        seen,
        asked,
        kind=texts["kind"],
        third=texts["third"],
        box=place,
        fault=fault_of_address(seen) if isinstance(seen, str) else None,
        answers=answers,
    )


def _seen(found: dict[str, Any], folder: Path, image: str) -> Path | VideoFile | str:
    """The image or the video that a line names; a ValueError says what is wrong with it."""
    picture, video = found.get(image), found.get("video")
    if picture is not None and video is not None:
        raise ValueError(f'it has both "{image}" and "video"; a question is about one of them.')
    if video is None:
        if not isinstance(picture, str) or not picture:
            raise ValueError(
                f'"{image}" must be the path of an image, or "video" that of a video, relative to '
                "this file."
            )
        return picture if is_address(picture) else folder / picture
    if not isinstance(video, str) or not video:
        raise ValueError('"video" must be the path of a video, relative to this file.')
    frames = found.get("frames", VideoFile.frames)
    if type(frames) is not int or frames < 1:
        raise ValueError(f'"frames" must be a whole number from 1, not {frames!r:.60}.')
    return VideoFile(folder / video, frames)


def _read(path: Path, what: str) -> str:
    """The text of a file; `what` it holds is for messages."""
    try:
        return read_regular(path, _LARGEST).decode("utf-8-sig")
    except OSError as error:
        raise InputError(
            f"Cannot read the {what} in {shown(path)}: {error.strerror or error}."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"The {what} in {shown(path)} are not UTF-8 text.") from error
