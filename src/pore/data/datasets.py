"""Samples from a data set of the `datasets` library."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pore.data.samples import Sample, is_missing, text_of
from pore.errors import InputError


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
        answer: Column that holds the answer; there need not be one. Of a list of answers the most
            frequent counts. See `Sample` for what is taken as an answer.
        limit: Use at most this many samples, from the first.

    Returns:
        The samples, each made when it is asked for: a sequence, or for an `IterableDataset` an
        iterable that can be gone through many times. The id is the row's number with its own
        `question_id` or `id`.

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
    if is_missing(name):
        name = None
    asked = row[question]
    if not isinstance(asked, str):
        raise InputError(f"Row {number} of the data set: {question!r} is no text.")
    answered = row.get(answer)
    several = isinstance(answered, (list, tuple)) or getattr(answered, "ndim", None) == 1
    given: Iterable[Any] = answered if several else [answered]  # type: ignore[assignment]
    try:
        texts = [text for text in map(text_of, given) if text is not None]
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
