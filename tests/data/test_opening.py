"""Data sets by name: parquet, as they were saved, from the hub; what is wrong is said at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest

from helpers.checkpoint import save_shards
from pore.cli.options import columns
from pore.data.datasets import from_dataset
from pore.data.files import from_jsonl
from pore.data.opening import shards
from pore.data.sources import load_samples
from pore.errors import InputError


def made(rows: int = 5) -> datasets.Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    found = datasets.Dataset.from_dict(
        {
            "picture": [PIL.Image.fromarray(pixels)] * rows,
            "ask": [f"question {i}" for i in range(rows)],
            "reply": ["yes"] * rows,
            "n": list(range(rows)),
        }
    )
    return found.cast_column("picture", datasets.Image())


NAMES = {"image": "picture", "question": "ask", "answer": "reply"}


@pytest.fixture(params=["file", "folder", "saved", "splits"])
def local(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    if request.param == "splits":
        datasets.DatasetDict({"train": made(), "test": made(2)}).save_to_disk(folder)
    elif request.param == "saved":
        made().save_to_disk(folder)
    else:
        folder.mkdir()
        made().to_parquet(folder / "train-00000-of-00001.parquet")
        if request.param == "file":
            return folder / "train-00000-of-00001.parquet"
    return folder


@pytest.mark.parametrize("stream", [False, True])
def test_data_sets_of_every_kind(local: Path, stream: bool) -> None:
    found = load_samples(local, split="train", limit=3, stream=stream, **NAMES)
    for _ in range(2):  # they can be gone through again
        assert [(s.id, s.question, s.answer) for s in found] == [
            (str(i), f"question {i}", "yes") for i in range(3)
        ]
    assert next(iter(found)).load_image().size == (12, 8)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_files_of_several_kinds(kind: str, stream: bool, tmp_path: Path) -> None:
    columns = save_shards(tmp_path / "data", kind, 5)
    named = dict(pair.split("=") for pair in columns.split(","))
    files = sorted((tmp_path / "data").iterdir())
    found = list(load_samples(tmp_path / "data", split="train", stream=stream, **named))
    assert [sample.question for sample in found] == [f"w{6 + i} w20" for i in range(5)]
    assert [sample.load_image().size for sample in found] == [(32, 32)] * 5
    (first, second) = load_samples(files[0], stream=stream, **named)
    assert (first.question, second.question) == (found[0].question, found[1].question)
    assert shards(str(tmp_path / "data"), "train") == [str(file) for file in files]
    assert shards(str(files[1]), "test") == [str(files[1])]
    with pytest.raises(InputError, match="has no split 'test'; it has train"):
        shards(str(tmp_path / "data"), "test")


def test_what_is_not_read_from_files(tmp_path: Path) -> None:
    made().save_to_disk(tmp_path / "saved")
    assert shards(str(tmp_path / "saved"), "train") is None
    assert shards("owner/name", "train") is None
    assert shards("s3://bucket/asked.parquet", "train") == ["s3://bucket/asked.parquet"]


def test_a_split_that_is_not_there(local: Path) -> None:
    if local.is_dir() and not (local / "state.json").exists():
        with pytest.raises(InputError, match=r"dev.*train"):
            load_samples(local, split="dev", **NAMES)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({}, r"no column 'image'; it has picture, ask, reply, n\. Name .* --columns image=\.\.\."),
        ({"image": "picture"}, r"no column 'question'; .* holds the question: --columns quest"),
        ({"image": "n", "question": "ask"}, r"'n' of the data set holds no pictures"),
        ({"image": "picture", "question": "n"}, r"'n' is not text"),
        ({"image": "picture", "question": "picture"}, r"'picture' is not text"),
    ],
)
def test_columns_are_looked_at_first(
    tmp_path: Path, names: dict[str, str], message: str, stream: bool
) -> None:
    made().to_parquet(tmp_path / "data.parquet")
    with pytest.raises(InputError, match=message):
        load_samples(tmp_path / "data.parquet", stream=stream, **names)  # before the first row


def test_rows_without_a_question_are_bad_samples() -> None:
    data = datasets.Dataset.from_dict({"image": ["a.png"] * 3, "question": ["q", None, "r"]})
    first, second, third = from_dataset(data)
    assert (first.fault, third.fault) == (None, None)
    with pytest.raises(InputError, match="Sample 1 has no text in the column 'question'"):
        second.load_image()


def test_paths_are_relative_to_the_data_set(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (12, 8)).save(tmp_path / "a.png")
    data = datasets.Dataset.from_dict({"image": ["a.png"], "question": ["q"]})
    data.to_parquet(tmp_path / "data.parquet")
    (sample,) = load_samples(tmp_path / "data.parquet")
    assert sample.load_image().size == (12, 8)


def test_keys_of_lines(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    line = {"picture": "a.png", "ask": "q", "reply": 3, "answer": "no"}
    file.write_text(json.dumps(line))
    (sample,) = load_samples(file, **NAMES)
    assert (sample.question, sample.answer, sample.image) == ("q", "3", tmp_path / "a.png")
    (sample,) = from_jsonl(file, image="picture", question="ask", answer=None)
    assert sample.answer is None
    with pytest.raises(InputError, match=r'line 1: "ask2" must be a text'):
        load_samples(file, image="picture", question="ask2")


def test_what_has_no_columns(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (12, 8)).save(tmp_path / "a.png")
    for source, questions in (("embedded:test", None), (str(tmp_path), ["q"])):
        with pytest.raises(InputError, match="has no columns to name"):
            load_samples(source, questions=questions, image="picture", limit=1)


@pytest.mark.parametrize(
    ("name", "hub_id", "configuration"),
    [
        ("owner/name", "owner/name", None),
        ("owner/name:en", "owner/name", "en"),
        ("hf://datasets/owner/name", "owner/name", None),
        ("https://huggingface.co/datasets/owner/name/", "owner/name", None),
    ],
)
def test_names_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, name: str, hub_id: str, configuration: str | None
) -> None:
    asked: list[Any] = []

    def load(given: str, name: str | None = None, **how: Any) -> Any:
        asked.append((given, name, how))
        return made().to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(list(load_samples(name, split="dev", stream=True, limit=4, **NAMES))) == 4
    assert asked == [(hub_id, configuration, {"split": "dev", "streaming": True})]


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"no network, fetch it elsewhere .* save_to_disk"):
        load_samples("owner/name", stream=True)


class Broken(datasets.IterableDataset):
    """A stream whose connection is lost."""

    column_names = ["image", "question"]  # noqa: RUF012 - as datasets has it
    features = None

    def __init__(self) -> None:
        pass

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield {"image": None, "question": "q"}
        raise TimeoutError("gone")


def test_a_stream_that_breaks_off() -> None:
    with pytest.raises(InputError, match="broke off after 1 rows: TimeoutError: gone"):
        list(from_dataset(Broken()))


def test_the_option() -> None:
    assert columns(None) == {}
    assert columns("image=a, question=b c,answer=d=e") == {
        "image": "a",
        "question": "b c",
        "answer": "d=e",
    }
    for wrong in ("picture=a", "image", "image=", "image=a,image=b", ","):
        with pytest.raises(InputError, match="--columns takes image=NAME"):
            columns(wrong)
