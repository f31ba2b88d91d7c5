"""Images with questions, from a folder, a JSONL file, a data set or the embedded scenes.

Calibration and evaluation read the same `Sample`s. Images are opened when they are needed, so that
a list of samples is small and one bad image is one bad sample.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pore._files import read_regular, shown
from pore._images import open_image
from pore._saved.parsing import parse_json
from pore.errors import InputError

if TYPE_CHECKING:
    import PIL.Image


SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


EMBEDDED = "embedded:"


EMBEDDED_SAMPLES = 1000


_TEXTS = ("answer", "id", "kind", "third")


_LARGEST = 1 << 30


_WHOLE = 1e15  # above it, floats are written with an exponent


_MISSING = ("NAType", "NaTType")  # of pandas, which need not be there


@dataclass(frozen=True)
class Sample:
    """A question about an image.

    Attributes:
        id: Names the sample in messages and reports.
        image: The image, its file, its encoded bytes, or None for a question without one.
        question: The question, without template and placeholder.
        answer: The right answer, where known. A number becomes text, a whole one without a point,
            and True and False their names. NaN, what pandas has for it, and blank text are no
            answer; nor are they a kind or a third.
        kind: Kind of question, for accuracy per kind.
        third: Third of the image that the answer is in ("top", "middle", "bottom"), where known.
    """

    id: str
    image: PIL.Image.Image | Path | str | bytes | None
    question: str
    answer: str | None = None
    kind: str | None = None
    third: str | None = None

    def __post_init__(self) -> None:
        for name in ("answer", "kind", "third"):
            try:
                object.__setattr__(self, name, _text(getattr(self, name)))
            except ValueError as error:
                raise InputError(f"The {name} of sample {self.id} {error}") from error

    def load_image(self) -> PIL.Image.Image:
        """The whole image as a viewer shows it, in RGB; see `pore._images.open_image`.

        Raises:
            InputError: There is no image, it is missing, damaged or cut off, or it is none of the
                formats and shapes that are opened.
        """
        if self.image is None:
            raise InputError(f"Sample {self.id} has no image.")
        try:
            return open_image(self.image)
        except Exception as error:  # decoders of damaged files raise all kinds of errors
            what = f" {shown(self.image)}" if isinstance(self.image, (str, os.PathLike)) else ""
            why = str(error) if isinstance(error, InputError) else _reason(error)
            raise InputError(
                f"The image{what} of sample {self.id} cannot be read: {why}"
            ) from error


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
    """Samples from whatever `source` names: the one way in for the command line.

    Args:
        source: "embedded:calibration" or another split of the embedded scenes, a JSONL file
            (`from_jsonl`), a folder of images (`from_folder`), or the hub id of a data set
            (`from_dataset`).
        questions: For a folder, the questions or the text file of them; required there.
        limit: At most so many samples, from the first; None for all, and for
            `EMBEDDED_SAMPLES` embedded ones.
        split: Split of a data set.
        image: Column of a data set that holds the image.
        question: Column that holds the question.
        answer: Column that holds the answer.

    Returns:
        The samples, which can be gone through many times; a sequence, but for a streamed data set.

    Raises:
        InputError: There is no such source, or it cannot be read; a local file or folder that is
            no source of samples says what it should be.
    """
    if limit is not None and limit < 1:
        raise InputError(f"The number of samples must be at least 1, not {limit}.")
    name = os.fspath(source)
    path = Path(name)
    # Not pathlib's, which raise errors for names that no file can have.
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


def from_folder(
    folder: str | os.PathLike[str], questions: Sequence[str] | str | os.PathLike[str]
) -> list[Sample]:
    """A sample for every image in a folder and the folders in it, in the order of their paths.

    Args:
        folder: The folder. Files whose names do not end as images do, and hidden ones, are left
            out.
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


def from_jsonl(path: str | os.PathLike[str]) -> list[Sample]:
    """Samples from a file with one JSON object on each line.

    Each has `question` and `image`, the image's path relative to the file, and may have `answer`,
    `id`, `kind` and `third`; other keys are passed over. Of these, numbers and true and false are
    taken as texts, and null, NaN, an empty list and blank text as not being there. A sample without
    an id gets the name of the file and the number of its line.

    Args:
        path: The file; blank lines are passed over.

    Returns:
        The samples. Their images are not looked at yet.

    Raises:
        InputError: The file cannot be read or holds no sample, or a line is not as above; the
            message names file and line.
    """
    file = Path(path)
    samples = []
    for number, line in enumerate(_read(file, "samples").split("\n"), 1):
        if line.strip():
            try:
                samples.append(_from_line(line, file, number))
            except ValueError as error:
                raise InputError(f"{shown(file)}, line {number}: {error}") from error
    if not samples:
        raise InputError(f"There is no sample in {file}.")
    return samples


def _from_line(line: str, file: Path, number: int) -> Sample:
    found = parse_json(line, finite=False)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object.")
    if not isinstance(found.get("image"), str) or not found["image"]:
        raise ValueError('"image" must be the path of an image, relative to this file.')
    if not isinstance(found.get("question"), str):
        raise ValueError('"question" must be a text.')
    texts = {}
    for name in _TEXTS:
        value = found.get(name)
        try:
            texts[name] = _text(None if value == [] else value)
        except ValueError as error:
            raise ValueError(f'"{name}" {error}') from error
    return Sample(
        texts["id"] or f"{shown(file.name)}:{number}",
        file.parent / found["image"],
        found["question"],
        texts["answer"],
        texts["kind"],
        texts["third"],
    )


def from_scenes(split: str, n: int) -> list[Sample]:
    """Questions about the scenes of the embedded model, balanced over kinds and thirds.

    Args:
        split: "calibration", "test" or "train".
        n: Number of questions, each about a scene of its own.

    Returns:
        The samples, always the same.

    Raises:
        InputError: There is no such split.
    """
    import PIL.Image

    from pore.embedded import scenes

    if split not in scenes.SPLITS:
        raise InputError(
            f"There are no embedded scenes {split!r}; the splits are {', '.join(scenes.SPLITS)}."
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


def from_dataset(
    dataset: Any,
    *,
    split: str = "test",
    image: str = "image",
    question: str = "question",
    answer: str = "answer",
    limit: int | None = None,
) -> Iterable[Sample]:
    """Samples from a data set of the `datasets` library, whose images stay encoded until needed.

    Args:
        dataset: Hub id or path for `datasets.load_dataset`, or a loaded `Dataset` or
            `IterableDataset`.
        split: The split to load, where `dataset` is a name.
        image: Column that holds the image, as an image, a path or encoded bytes.
        question: Column that holds the question.
        answer: Column that holds the answer, passed over where there is none; of a list the most
            frequent counts. What is taken for an answer is said at `Sample`.
        limit: At most so many samples, from the first.

    Returns:
        The samples, made when asked for: a sequence, or for an `IterableDataset` an iterable that
        can be gone through again. The id is the row's own `id` or `question_id` with its number.

    Raises:
        InputError: The library is missing, or the data set cannot be loaded or lacks a column.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "Reading data sets needs the datasets library: pip install 'pore-vlm[datasets]'."
        ) from error
    if isinstance(dataset, (str, os.PathLike)):
        name = os.fspath(dataset)
        try:
            dataset = datasets.load_dataset(name, split=split)
        except Exception as error:  # hub, cache, parsers: each has its own errors
            raise InputError(
                f"{name} is no file or folder here, and cannot be loaded as a data set (split "
                f"{split!r}): {type(error).__name__}: {error}"
            ) from error
    streamed = isinstance(dataset, datasets.IterableDataset)
    columns = dataset.column_names or list(next(iter(dataset), {}))
    for column in (image, question):
        if column not in columns:
            raise InputError(
                f"The data set has no column {column!r}; it has {', '.join(columns) or 'none'}."
            )
    if isinstance((dataset.features or {}).get(image), datasets.Image):
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    if limit is not None:
        dataset = dataset.take(limit if streamed else min(limit, len(dataset)))
    make = partial(_from_row, image=image, question=question, answer=answer)
    return _Stream(dataset, make) if streamed else _Rows(dataset, make)


def _from_row(
    number: int, row: Mapping[str, Any], *, image: str, question: str, answer: str
) -> Sample:
    name = row.get("question_id", row.get("id"))
    if _is_missing(name):
        name = None
    asked = row[question]
    if not isinstance(asked, str):
        raise InputError(f"Row {number} of the data set: {question!r} is no text.")
    answered = row.get(answer)
    several = isinstance(answered, (list, tuple)) or getattr(answered, "ndim", None) == 1
    given: Iterable[Any] = answered if several else [answered]  # type: ignore[assignment]
    try:
        texts = [text for text in map(_text, given) if text is not None]
    except ValueError as error:
        raise InputError(
            f"Row {number} of the data set: {answer!r} holds no text: it {error} Name the "
            "column of the answers, or one that does not exist to have none."
        ) from error
    picture = row[image]
    if isinstance(picture, Mapping):  # as datasets stores images that it does not decode
        picture = picture["bytes"] or picture["path"]
    return Sample(
        f"{number}" if name is None else f"{number}:{name}",
        picture,
        asked,
        Counter(texts).most_common(1)[0][0] if texts else None,
    )


@dataclass(frozen=True)
class _Rows(Sequence[Sample]):
    """Samples of a data set with random access."""

    dataset: Any
    make: partial[Sample]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return self.make(number, self.dataset[number])


@dataclass(frozen=True)
class _Stream(Iterable[Sample]):
    """Samples of a streamed data set."""

    dataset: Any
    make: partial[Sample]

    def __iter__(self) -> Iterator[Sample]:
        return (self.make(number, row) for number, row in enumerate(self.dataset))


def _text(value: Any) -> str | None:
    """A text or a number as text, and None for what is missing; ValueError says what else it is."""
    if _is_missing(value):
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


def _is_missing(value: Any) -> bool:
    """Whether it is None, NaN or what pandas has for these."""
    if value is None or type(value).__name__ in _MISSING:
        return True
    unequal = value != value  # as nothing but NaN and NaT is
    return isinstance(unequal, (bool, np.bool_)) and bool(unequal)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"
    return f"{type(error).__name__}: {error}"


def _read(path: Path, what: str) -> str:
    try:
        return read_regular(path, _LARGEST).decode("utf-8-sig")
    except OSError as error:
        raise InputError(
            f"Cannot read the {what} in {shown(path)}: {error.strerror or error}."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"The {what} in {shown(path)} are not UTF-8 text.") from error
