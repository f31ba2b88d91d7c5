"""Samples from every source, and what is wrong with a source said where it is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest

from pore.data.datasets import from_dataset
from pore.data.files import from_folder, from_jsonl
from pore.data.samples import Sample
from pore.data.sources import from_scenes, load_samples
from pore.errors import InputError


def picture(mode: str = "RGB", size: tuple[int, int] = (12, 8)) -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    (root / ".cache").mkdir()
    for name in ("b.png", "a.JPG", "more/c.webp", ".hidden.png", ".cache/d.png"):
        picture().save(root / name, format=None if name[0] != "a" else "JPEG")
    (root / "notes.txt").write_text("no image")
    return root


# -- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
def test_every_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("i.tiff" if mode == "CMYK" else "i.png")
    picture(mode).save(file)
    for image in (file, str(file), file.read_bytes(), picture(mode)):
        loaded = Sample("a", image, "q").load_image()
        assert (loaded.mode, loaded.size) == ("RGB", (12, 8))


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    picture().save(tmp_path / "i.jpg", exif=exif)
    assert Sample("a", tmp_path / "i.jpg", "q").load_image().size == (8, 12)


@pytest.mark.parametrize("cut", [0, 20, 150])
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif"])
def test_damaged_images_are_named(tmp_path: Path, suffix: str, cut: int) -> None:
    file = tmp_path / f"photo.{suffix}"
    picture(size=(90, 90)).save(file)
    data = file.read_bytes()[:cut]
    file.write_bytes(data)
    with pytest.raises(InputError, match=rf"photo\.{suffix} of sample no\. 7 cannot be read"):
        Sample("no. 7", file, "q").load_image()
    with pytest.raises(InputError, match=r"The image of sample no\. 7 cannot be read"):
        Sample("no. 7", data, "q").load_image()


def test_missing_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.png of sample a cannot be read: there is no"):
        Sample("a", tmp_path / "gone.png", "q").load_image()
    with pytest.raises(InputError, match="a has no image"):
        Sample("a", None, "q").load_image()


# -- folder -------------------------------------------------------------------------------------


def test_folder_in_the_order_of_paths(folder: Path, tmp_path: Path) -> None:
    found = from_folder(folder, ["What is this?", "Where is it?"])
    assert [(s.id, s.question) for s in found] == [
        ("a.JPG", "What is this?"),
        ("b.png", "Where is it?"),
        ("more/c.webp", "What is this?"),
    ]
    assert found[2].load_image().size == (12, 8)
    (tmp_path / "questions.txt").write_text("What is this?\n\n  Where is it?  \n")
    assert from_folder(folder, tmp_path / "questions.txt") == found


def test_folder_without_what_it_needs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        from_folder(tmp_path / "other", ["q"])
    with pytest.raises(InputError, match="no question"):
        from_folder(folder, [])
    with pytest.raises(InputError, match="Cannot read the questions"):
        from_folder(folder, tmp_path / "questions.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image"):
        from_folder(tmp_path / "empty", ["q"])


# -- JSONL --------------------------------------------------------------------------------------


def test_jsonl(folder: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"image": "b.png", "question": "What?", "answer": 3, "id": "x", "kind": "count"},
        {"image": "more/c.webp", "question": "Wo ist die Tür?", "third": "top", "other": [1]},
        {"image": "not there.png", "question": ""},
    ]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    file = folder / "samples.jsonl"
    file.write_text("\ufeff" + text.replace("\n\n", "\r\n\n"), encoding="utf-8")
    first, second, third = from_jsonl(file)
    assert first == Sample("x", folder / "b.png", "What?", "3", "count")
    assert second == Sample(
        "samples.jsonl:3", folder / "more/c.webp", "Wo ist die Tür?", third="top"
    )
    assert second.load_image().size == (12, 8)
    assert third.id == "samples.jsonl:5"  # bad, but for whoever opens the image to say


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting"),
        ("[1]", "not a JSON object"),
        ('{"question": "q"}', '"image" must be'),
        ('{"image": "", "question": "q"}', '"image" must be'),
        ('{"image": "a.png"}', '"question" must be'),
        ('{"image": "a.png", "video": "b.mp4", "question": "q"}', "both"),
        ('{"video": 3, "question": "q"}', '"video" must be the path'),
        ('{"video": "b.mp4", "frames": 0, "question": "q"}', '"frames" must be a whole number'),
        ('{"image": "a.png", "question": "q", "answer": [["a"]]}', '"answer" must be a text'),
        ("[" * 100_000, "recursion"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text('{"image": "a.png", "question": "q"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=rf"samples\.jsonl, line 3: .*{message}"):
        from_jsonl(file)


def test_unreadable_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    with pytest.raises(InputError, match="Cannot read the samples"):
        from_jsonl(file)
    file.write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match="not UTF-8"):
        from_jsonl(file)
    file.write_text("\n")
    with pytest.raises(InputError, match="no sample in"):
        from_jsonl(file)


# -- embedded scenes ----------------------------------------------------------------------------


def test_scenes_are_always_the_same() -> None:
    one, other = from_scenes("calibration", 8), from_scenes("calibration", 8)
    for a, b in zip(one, other, strict=True):
        assert a.load_image().tobytes() == b.load_image().tobytes()
        assert (a.id, a.question, a.answer, a.kind) == (b.id, b.question, b.answer, b.kind)
    assert one[0].id == "calibration-0"
    assert one[0].load_image().size == (96, 96)
    assert len({s.kind for s in one}) == 7
    with pytest.raises(InputError, match="splits are train, calibration, test"):
        from_scenes("validation", 1)


# -- data sets ----------------------------------------------------------------------------------


def make_dataset(images: list[Any], **columns: list[Any]) -> Any:
    asked = [f"question {i}" for i in range(len(images))]
    found = datasets.Dataset.from_dict({"image": images, "question": asked, **columns})
    return found if isinstance(images[0], str) else found.cast_column("image", datasets.Image())


def test_dataset_decodes_images_when_asked(tmp_path: Path) -> None:
    bad = {"bytes": b"no image", "path": None}
    found = from_dataset(make_dataset([picture(), bad], answer=["yes", None], id=["a", "b"]))
    assert len(found) == 2  # type: ignore[arg-type]
    first, second = found
    assert (first.id, first.question, first.answer) == ("0:a", "question 0", "yes")
    assert first.load_image().tobytes() == picture().tobytes()
    assert second.answer is None
    with pytest.raises(InputError, match="1:b cannot be read"):
        second.load_image()
    assert found[-1].id == "1:b"  # type: ignore[index]
    assert [s.id for s in found[:1]] == ["0:a"]  # type: ignore[index]
    picture().save(tmp_path / "i.png")
    (named,) = from_dataset(make_dataset([str(tmp_path / "i.png")]))
    assert named.load_image().size == (12, 8)


def test_dataset_columns() -> None:
    data = make_dataset([picture()], votes=[["no", "yes", "yes"]], n=[3], bad=[{"a": 1}])
    (sample,) = from_dataset(data, answer="votes")
    assert sample.answer == "yes"
    (sample,) = from_dataset(data, answer="n")
    assert sample.answer == "3"
    (sample,) = from_dataset(data)
    assert (sample.id, sample.answer) == ("0", None)
    with pytest.raises(InputError, match="'bad' holds no text"):
        list(from_dataset(data, answer="bad"))
    with pytest.raises(InputError, match="'n' is not text"):
        list(from_dataset(data, question="n"))
    with pytest.raises(InputError, match="no column 'text'; it has image, question"):
        from_dataset(data, question="text")


def test_streamed_dataset() -> None:
    data = make_dataset([picture()] * 5)
    found = from_dataset(data.to_iterable_dataset(), limit=3)
    for _ in range(2):
        assert [s.id for s in found] == ["0", "1", "2"]
    assert next(iter(found)).load_image().size == (12, 8)
    assert len(from_dataset(data, limit=9)) == 5  # type: ignore[arg-type]


# -- the one way in -----------------------------------------------------------------------------


def test_load_samples_knows_the_sources(folder: Path) -> None:
    (folder / "samples.jsonl").write_text('{"image": "b.png", "question": "q"}\n' * 3)
    assert len(list(load_samples(folder / "samples.jsonl", limit=2))) == 2
    assert len(list(load_samples(str(folder), questions=["q"], limit=2))) == 2
    assert [s.id for s in load_samples("embedded:test", limit=2)] == ["test-0", "test-1"]
    mixed = list(load_samples("embedded:test:mixed", limit=7))
    assert [s.id for s in mixed] == [f"test-{i}" for i in range(7)]
    assert len({s.load_image().size for s in mixed}) > 2
    assert min(side for s in mixed for side in s.load_image().size) == 288


def test_load_samples_refuses(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="folder of images; give the questions"):
        load_samples(folder)
    with pytest.raises(InputError, match="Questions go with a folder"):
        load_samples("embedded:test", questions=["q"])
    with pytest.raises(InputError, match="at least 1"):
        load_samples("embedded:test", limit=0)
    with pytest.raises(InputError, match="splits are"):
        load_samples("embedded:dev", limit=1)
    with pytest.raises(InputError, match="no file or folder"):
        load_samples(tmp_path / "other")
    with pytest.raises(InputError, match="Cannot read the samples"):
        load_samples("other.jsonl")

    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"cannot be loaded as a data set.*no network"):
        load_samples("owner/name")


@pytest.mark.parametrize(
    "given",
    [
        ["yes", "no", "no", None, ""],
        [{"answer": "yes", "answer_id": 1}, {"answer": "no"}, {"answer": "no"}],
        {"answer": ["yes", "no", "no"], "answer_id": [1, 2, 3]},
    ],
)
def test_several_answers(tmp_path: Path, given: Any) -> None:
    """Those of ten people, as lists or as the files of VQAv2 have them."""
    file = tmp_path / "s.jsonl"
    file.write_text(json.dumps({"image": "a.png", "question": "q", "answer": given}))
    (sample,) = from_jsonl(file)
    assert (sample.answer, sample.answers) == ("no", ("yes", "no", "no"))
    assert Sample("a", None, "q", "no").accepted == ("no",)
    assert Sample("a", None, "q").accepted == ()
    assert replace(Sample("a", None, "q", "no"), answer=None).accepted == ()


def test_addresses_are_refused_in_words(tmp_path: Path) -> None:
    """Nothing is fetched: one is a bad sample, and nothing but addresses is no data."""
    lines = [{"image": name, "question": "q"} for name in ("https://x.org/a.png", "a.png")]
    file = tmp_path / "s.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    bad, good = from_jsonl(file)
    assert good.image == tmp_path / "a.png"
    with pytest.raises(
        InputError, match=r"s\.jsonl:1 has the address 'https://x\.org/a\.png'.*dow"
    ):
        bad.load()
    file.write_text(json.dumps(lines[0]))
    with pytest.raises(InputError, match=r"every sample, such as s\.jsonl:1, has the address"):
        from_jsonl(file)
    rows = {"image": [line["image"] for line in lines], "question": ["q", "q"]}
    bad, good = from_dataset(datasets.Dataset.from_dict(rows))
    assert good.fault is None
    with pytest.raises(InputError, match="download them, and name the files"):
        bad.load()
    with pytest.raises(InputError, match="Every row of the data set has the address"):
        from_dataset(datasets.Dataset.from_dict(rows).select([0]))
    with pytest.raises(InputError, match="has the address"):
        Sample("a", "s3://bucket/a.png", "q").load()
