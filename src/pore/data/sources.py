"""Samples by name: from a folder, a JSONL file, a data set or the embedded scenes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pore._files import shown
from pore.data.datasets import from_dataset
from pore.data.files import from_folder, from_jsonl
from pore.data.samples import Sample
from pore.embedded import scenes
from pore.embedded.splits import SPLITS
from pore.errors import InputError

EMBEDDED = "embedded:"

EMBEDDED_SAMPLES = 1000


def load_samples(
    source: str | os.PathLike[str],
    *,
    questions: Sequence[str] | str | os.PathLike[str] | None = None,
    limit: int | None = None,
    split: str = "test",
    image: str = "image",
    question: str = "question",
    answer: str = "answer",
) -> Iterable[Sample]:
    """Samples from whatever `source` names, as the command line takes it.

    Args:
        source: "embedded:calibration" or another split of the embedded scenes, a JSONL file
            (`from_jsonl`), a folder of images (`from_folder`), or the hub id of a data set
            (`from_dataset`).
        questions: For a folder, the questions or the text file of them; required there.
        limit: Largest number of samples, from the first; None for all, or for `EMBEDDED_SAMPLES`
            embedded ones.
        split: Split of a data set.
        image: Column of a data set that holds the image.
        question: Column that holds the question.
        answer: Column that holds the answer.

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
    if name.startswith(EMBEDDED):
        return from_scenes(name.removeprefix(EMBEDDED), limit or EMBEDDED_SAMPLES)
    if is_folder:
        if questions is None:
            raise InputError(
                f"{name} is a folder of images; give the questions to ask about them, or a text "
                "file with one on each line."
            )
        return from_folder(path, questions)[:limit]
    if path.suffix in (".jsonl", ".ndjson") or os.path.exists(name):
        return from_jsonl(path)[:limit]
    if path.is_absolute() or name.startswith("."):
        raise InputError(f"There is no file or folder {shown(name)}.")
    return from_dataset(
        name, split=split, image=image, question=question, answer=answer, limit=limit
    )


def from_scenes(split: str, n: int) -> list[Sample]:
    """Questions about the scenes of the embedded model, balanced over kinds and thirds.

    Args:
        split: "calibration", "test", "fresh" or "train".
        n: Number of questions, each about a different scene.

    Returns:
        The samples, always the same.

    Raises:
        InputError: There is no such split.
    """
    import PIL.Image

    if split not in SPLITS:
        raise InputError(
            f"There are no embedded scenes {split!r}; the splits are {', '.join(SPLITS)}."
        )
    return [
        Sample(
            f"{split}-{i}",
            PIL.Image.fromarray(scene.image),
            asked.question,
            asked.answer,
            asked.kind,
            asked.third,
        )
        for i, (scene, asked) in enumerate(scenes.questions(split, n))
    ]
