"""Samples from a data set of the `datasets` library."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from pore.data.opening import library, opened
from pore.data.samples import Sample, answers_of, fault_of_address, is_address, is_missing
from pore.errors import InputError


def from_dataset(
    dataset: Any,
    *,
    split: str = "test",
    image: str = "image",
    question: str = "question",
    answer: str | None = "answer",
    limit: int | None = None,
    stream: bool = False,
) -> Iterable[Sample]:
    """Samples from a data set of the `datasets` library, whose images stay encoded until needed.

    Args:
        dataset: Hub id, `id:configuration`, parquet file or folder (`pore.data.opening.opened`), or
            a loaded `Dataset` or `IterableDataset`.
        split: The split to load, where `dataset` is a name.
        image: Column that holds the image, as an image, a path or encoded bytes. A path is relative
            to the folder of a data set that is named by a path.
        question: Column that holds the question. A row without one is a bad sample.
        answer: Column that holds the answer, or a list of answers that are accepted; there need not
            be one. See `Sample` and `samples.answers_of` for what is taken. None to have none.
        limit: Use at most this many samples, from the first.
        stream: Whether to read a data set that is named as it is needed, instead of fetching all of
            it first.

    Returns:
        The samples, each made when it is asked for: a sequence, or for an `IterableDataset` an
        iterable that can be gone through many times. The id is the row's number with its own
        `question_id` or `id`.

    Raises:
        InputError: The library is missing, or the data set cannot be loaded, lacks a column or has
            other things in it than images or texts.
    """
    datasets = library()
    folder: Path | None = None
    if isinstance(dataset, (str, os.PathLike)):
        name = os.fspath(dataset)
        if os.path.exists(name):
            folder = Path(name) if os.path.isdir(name) else Path(name).parent
        dataset = opened(name, split, stream)
    streamed = isinstance(dataset, datasets.IterableDataset)
    _check_columns(dataset.column_names or list(next(iter(dataset), {})), image, question)
    features = dataset.features or {}
    _check_features(features.get(image), image, features.get(question), question)
    if isinstance(features.get(image), datasets.Image):
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    if limit is not None:
        dataset = dataset.take(limit if streamed else min(limit, len(dataset)))
    if not streamed and getattr(features.get(image), "dtype", "") in _TEXTS:
        named = dataset[image]
        if len(named) and all(isinstance(one, str) and is_address(one) for one in named):
            raise InputError(f"Every row of the data set {fault_of_address(named[0])}")
    make = partial(_from_row, image=image, question=question, answer=answer, folder=folder)
    return _Stream(dataset, make) if streamed else _Rows(dataset, make)


def from_ray(
    files: Sequence[str],
    folder: Path | None,
    *,
    image: str = "image",
    question: str = "question",
    answer: str | None = "answer",
    limit: int | None = None,
) -> Iterable[Sample]:
    """Samples from files that Ray Data reads, on the machines of the cluster that is connected.

    Args:
        files: Parquet files or WebDataset files (.tar), on disks or in stores that Ray can read.
        folder: What paths of images are relative to.
        image: As in `from_dataset`.
        question: Likewise.
        answer: Likewise.
        limit: Likewise.

    Returns:
        The samples of `from_dataset(stream=True)`, in the same order.

    Raises:
        InputError: The files cannot be read, or a column is missing.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    packed = Path(files[0]).suffix == ".tar"
    try:
        data = (
            ray.data.read_webdataset(list(files), decoder=None)
            if packed
            else ray.data.read_parquet(list(files))
        )
        _check_columns(data.schema().names, image, question)
    except InputError:
        raise
    except Exception as error:  # of stores and parsers: each has its own errors
        raise InputError(
            f"Ray Data cannot read {files[0]}: {type(error).__name__}: {error}"
        ) from error
    if limit is not None:
        data = data.limit(limit)
    texts = [name for name in (question, answer) if packed and name is not None]
    make = partial(_from_row, image=image, question=question, answer=answer, folder=folder)
    return _Stream(_RayRows(data, texts), make)


@dataclass(frozen=True)
class _RayRows(Iterable[Mapping[str, Any]]):
    """The rows of a data set of Ray; some columns are texts, which it leaves as bytes."""

    data: Any
    texts: Sequence[str]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for row in self.data.iter_rows():
            read = {name: row[name].decode() for name in self.texts if type(row.get(name)) is bytes}
            yield {**row, **read}


def _check_columns(columns: Sequence[str], image: str, question: str) -> None:
    """Refuse a data set without the columns that are asked for."""
    for key, column in (("image", image), ("question", question)):
        if column not in columns:
            raise InputError(
                f"The data set has no column {column!r}; it has {', '.join(columns) or 'none'}. "
                f"Name the one that holds the {key}: --columns {key}=..., in Python {key}=."
            )


_TEXTS, _BYTES = ("string", "large_string"), ("binary", "large_binary")


def _check_features(picture: Any, image: str, asked: Any, question: str) -> None:
    """Refuse columns whose type is known to be neither pictures nor texts, before anything runs."""
    kind = type(picture).__name__
    holds = picture is None or kind == "Image" or getattr(picture, "dtype", "") in _TEXTS + _BYTES
    encoded = isinstance(picture, Mapping) and {"bytes", "path"} <= picture.keys()
    if not (holds or encoded):
        raise InputError(
            f"The column {image!r} of the data set holds no pictures, paths or bytes, but "
            f"{picture!r:.80}. Name another one: --columns image=..., in Python image=."
        )
    if asked is not None and getattr(asked, "dtype", "") not in _TEXTS:
        raise InputError(
            f"The column {question!r} is not text, but {asked!r:.80}. Name another one: --columns "
            "question=..., in Python question=."
        )


def _from_row(
    number: int,
    row: Mapping[str, Any],
    *,
    image: str,
    question: str,
    answer: str | None,
    folder: Path | None,
) -> Sample:
    name = row.get("question_id", row.get("id"))
    own = f"{number}" if is_missing(name) else f"{number}:{name}"
    asked = row[question]
    if not isinstance(asked, str):
        return Sample(own, b"", "", fault=f"has no text in the column {question!r}.")
    try:
        answers = () if answer is None else answers_of(row.get(answer))
    except ValueError as error:
        raise InputError(
            f"Row {number} of the data set: {answer!r} holds no text: it {error} Name the "
            "column of the answers, or one that does not exist to have none."
        ) from error
    picture = row[image]
    if isinstance(picture, Mapping):  # as datasets stores images that it does not decode
        picture = picture["bytes"] or picture["path"]
    fault = None
    if isinstance(picture, str):
        if is_address(picture):
            fault = fault_of_address(picture)
        elif folder is not None:
            picture = folder / picture
    return Sample(own, picture, asked, answers=answers, fault=fault)


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
        rows = iter(self.dataset)
        for number in count():
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # of the network, of parsers: each has its own errors
                raise InputError(
                    f"The data set broke off after {number} rows: {type(error).__name__}: {error}"
                ) from error
            yield self.make(number, row)
