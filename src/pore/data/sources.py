"""Samples by name: from a folder, a JSONL file, a data set or the embedded scenes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pore._files import shown
from pore._videos import Video
from pore.data.datasets import from_dataset, from_ray
from pore.data.files import from_folder, from_jsonl
from pore.data.opening import is_local, shards
from pore.data.samples import Sample
from pore.embedded import EMBEDDED_VIDEO, scenes, videos
from pore.embedded.splits import SPLITS, Split
from pore.errors import InputError
from pore.families.registry import family_of
from pore.identity import names_of

EMBEDDED = "embedded:"

MIXED = ":mixed"

VIDEO = ":video"

EMBEDDED_SAMPLES = 1000

_ENLARGED = 3  # times, where sizes are mixed: models of any size have larger patches


def load_samples(
    source: str | os.PathLike[str],
    *,
    questions: Sequence[str] | str | os.PathLike[str] | None = None,
    limit: int | None = None,
    split: str = "test",
    image: str = "image",
    question: str = "question",
    answer: str | None = "answer",
    stream: bool = False,
    by_ray: bool = False,
) -> Iterable[Sample]:
    """Samples from whatever `source` names, as the command line takes it.

    Args:
        source: "embedded:calibration" or another split of the embedded scenes, or the same as
            pictures of mixed sizes, "embedded:calibration:mixed", or as videos,
            "embedded:calibration:video"; a JSONL file (`from_jsonl`), a
            folder of images (`from_folder`), a parquet or WebDataset (.tar) file, a folder of
            these or one that `save_to_disk` wrote, or the hub id of a data set (`from_dataset`).
        questions: For a folder, the questions or the text file of them; required there.
        limit: Largest number of samples, from the first; None for all, or for `EMBEDDED_SAMPLES`
            embedded ones.
        split: Split of a data set.
        image: Column of a data set, or key of a JSONL file, that holds the image.
        question: Column or key that holds the question.
        answer: Column or key that holds the answer; None to have none.
        stream: Whether to read a data set as it is needed instead of fetching all of it first.
        by_ray: Whether Ray Data reads parquet and WebDataset files, on the cluster that is
            connected and from stores that it knows, as they are needed.
    Returns:
        The samples, which can be gone through many times. They are a sequence, except those of a
        streamed data set.

    Raises:
        InputError: There is no such source, or it cannot be read.
    """
    if limit is not None and limit < 1:
        raise InputError(f"The number of samples must be at least 1, not {limit}.")
    name = os.fspath(source)
    path = Path(name)
    # The functions of pathlib raise errors for names that no file can have.
    is_folder = os.path.isdir(name)
    if questions is not None and not is_folder:
        raise InputError(f"Questions go with a folder of images, which {name} is not.")
    columns: dict[str, Any] = {"image": image, "question": question, "answer": answer}
    is_data = os.path.exists(name) and is_local(path)
    of_images = is_folder and (questions is not None or not is_data)
    if (name.startswith(EMBEDDED) or of_images) and (image, question) != ("image", "question"):
        raise InputError(f"{name} has no columns to name; name those of data sets and JSONL files.")
    if name.startswith(EMBEDDED):
        scenes = name.removeprefix(EMBEDDED)
        if scenes.endswith(VIDEO):
            return from_videos(scenes.removesuffix(VIDEO), limit or EMBEDDED_SAMPLES)
        mixed = scenes.endswith(MIXED)
        return from_scenes(scenes.removesuffix(MIXED), limit or EMBEDDED_SAMPLES, mixed=mixed)
    if of_images:
        if questions is None:
            raise InputError(
                f"{name} is a folder of images; give the questions to ask about them, or a text "
                "file with one on each line."
            )
        return from_folder(path, questions)[:limit]
    files = shards(name, split) if by_ray else None
    if files is not None:
        return from_ray(files, path if is_folder else path.parent, limit=limit, **columns)
    if not is_data and (path.suffix in (".jsonl", ".ndjson") or os.path.exists(name)):
        return from_jsonl(path, **columns)[:limit]
    if not is_data and (path.is_absolute() or name.startswith(".")):
        raise InputError(f"There is no file or folder {shown(name)}.")
    return from_dataset(name, split=split, limit=limit, stream=stream, **columns)


def scenes_for(model: Any, split: Split) -> str:
    """The embedded scenes that suit a model, as `load_samples` takes them.

    Args:
        model: A supported model.
        split: The split of the scenes.

    Returns:
        Such as "embedded:test"; videos for the embedded model of videos, and in mixed sizes for a
        model of images of any size.
    """
    if names_of(model)["model"] == EMBEDDED_VIDEO:
        return f"{EMBEDDED}{split}{VIDEO}"
    mixed = MIXED if family_of(model).common_grid(model) is None else ""
    return f"{EMBEDDED}{split}{mixed}"


def from_scenes(split: str, n: int, *, mixed: bool = False) -> list[Sample]:
    """Questions about the scenes of the embedded model, balanced over kinds and thirds.

    Args:
        split: "calibration", "test", "fresh" or "train".
        n: Number of questions, each about a different scene.
        mixed: Whether the scenes are pictures of six sizes, from 288 × 288 to 384 × 576 pixels,
            with the same questions and answers; otherwise all have 96 × 96 pixels, as the embedded
            model takes them.

    Returns:
        The samples, always the same.

    Raises:
        InputError: There is no such split.
    """
    import PIL.Image

    known = _split(split)
    times = _ENLARGED if mixed else 1
    return [
        Sample(
            f"{split}-{i}",
            PIL.Image.fromarray(scene.image.repeat(times, 0).repeat(times, 1)),
            asked.question,
            asked.answer,
            asked.kind,
            asked.third,
        )
        for i, (scene, asked) in enumerate(scenes.questions(known, n, mixed=mixed))
    ]


def from_videos(split: str, n: int) -> list[Sample]:
    """Questions about the embedded videos, balanced over kinds and answers.

    Args:
        split: "calibration", "test", "fresh" or "train".
        n: Number of questions, each about a different video.

    Returns:
        The samples, always the same. Their images are a `Video` of eight frames each.

    Raises:
        InputError: There is no such split.
    """
    import PIL.Image

    found = []
    for i, video in enumerate(videos.questions(_split(split), n)):
        asked, frames = video.question, tuple(map(PIL.Image.fromarray, video.frames))
        shown = Video(frames, tuple(range(len(frames))))
        found.append(Sample(f"{split}-video-{i}", shown, asked.question, asked.answer, asked.kind))
    return found


def _split(name: str) -> Split:
    """A split by name."""
    if name not in SPLITS:
        raise InputError(
            f"There are no embedded scenes {name!r}; the splits are {', '.join(SPLITS)}, each "
            f"also as pictures of mixed sizes, such as {EMBEDDED}test{MIXED}, and as videos, "
            f"{EMBEDDED}test{VIDEO}."
        )
    return name
