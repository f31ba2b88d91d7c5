"""Pictures become what a viewer shows, however they come; what cannot be shown is refused."""

from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.photographs import SIZES
from pore import _images
from pore.data.datasets import from_dataset
from pore.data.files import from_jsonl
from pore.data.samples import Sample
from pore.errors import InputError

RAMP = np.linspace(0, 1, 256).reshape(16, 16)
GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
ORIENTATION = 0x0112

WAYS: dict[str, Callable[[bytes, Path], Any]] = {
    "bytes": lambda data, _: data,
    "path": lambda _, file: file,
    "str": lambda _, file: str(file),
    "lazy PIL": lambda data, _: PIL.Image.open(io.BytesIO(data)),
    "loaded PIL": lambda data, _: loaded(data),
    "copied PIL": lambda data, _: loaded(data).copy(),
}


def loaded(data: bytes) -> PIL.Image.Image:
    image = PIL.Image.open(io.BytesIO(data))
    image.load()
    return image


def encoded(image: PIL.Image.Image, kind: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def read(image: Any) -> np.ndarray:
    found = Sample("a", image, "q").load_image()
    assert found.mode == "RGB"
    return np.asarray(found).astype(int)


def grey(image: Any) -> np.ndarray:
    found = read(image)
    assert (found == found[..., :1]).all()
    return found[..., 0]


def refused(image: Any) -> str:
    with pytest.raises(InputError, match="of sample a cannot be read: ") as caught:
        Sample("a", image, "q").load_image()
    return str(caught.value)


# -- levels ----------------------------------------------------------------------------------------

LEVELS = {
    "I;16": ("I;16", RAMP * 65535, "<u2"),
    "I;16B": ("I;16B", RAMP * 65535, ">u2"),
    "I;16L": ("I;16L", RAMP * 65535, "<u2"),
    "I": ("I", RAMP * 65535, "<i4"),
    "I, beyond 16 bits": ("I", RAMP * 3_000_000, "<i4"),
    "I, negative": ("I", RAMP * 510 - 300, "<i4"),
    "F from 0 to 1": ("F", RAMP, "<f4"),
    "F a little above 1": ("F", np.minimum(RAMP * 1.02, 1.01), "<f4"),
    "F from 0 to 255": ("F", RAMP * 255, "<f4"),
    "F from -1 to 1": ("F", RAMP * 2 - 1, "<f4"),
    "F beyond 255": ("F", RAMP * 1e30, "<f4"),
}


@pytest.mark.parametrize("name", LEVELS)
def test_more_than_256_levels(name: str) -> None:
    mode, values, kind = LEVELS[name]
    pixels = np.rint(values) if kind[1] != "f" else values
    image = PIL.Image.frombytes(mode, (16, 16), pixels.astype(kind).tobytes())
    cut = name == "F a little above 1"
    assert np.abs(grey(image) - (np.minimum(GREY * 1.02, 255) if cut else GREY)).max() <= cut
    assert (grey(encoded(image, "TIFF")) == grey(image)).all()
    if mode in ("I;16", "I;16B"):
        assert (grey(encoded(image, "PNG")) == GREY).all()


@pytest.mark.parametrize("scale", [1, 40])
def test_dark_pictures_of_16_bits_stay_dark(scale: int) -> None:
    image = PIL.Image.fromarray(GREY.astype(np.uint16) * scale)
    assert (grey(image) == np.rint(GREY.astype(float) * scale / 257)).all()


def test_16_bits_that_a_tiff_says_are_inverted() -> None:
    image = PIL.Image.fromarray(np.rint(RAMP * 65535).astype(np.uint16))
    assert (grey(encoded(image, "TIFF", tiffinfo={262: 0})) == 255 - GREY).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_floats_that_are_no_numbers(bad: float) -> None:
    pixels = RAMP.astype(np.float32)
    pixels[3, 4] = bad
    image = PIL.Image.fromarray(pixels)
    assert "NaN or infinity" in refused(image)
    assert "NaN or infinity" in refused(encoded(image, "TIFF"))


@given(st.floats(-(2.0**99), 2.0**99, width=32), st.sampled_from(["I", "F"]))
def test_one_level_is_one_level(value: float, mode: str) -> None:
    kind: Any = np.float32 if mode == "F" else np.int32
    pixels = np.full((3, 3), np.clip(value, -(2**31), 2**31 - 1) if mode == "I" else value, kind)
    assert len(np.unique(grey(PIL.Image.fromarray(pixels)))) == 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_8_bits_are_as_pillow_converts_them(mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels).convert(mode)
    assert (read(image) == np.asarray(image.convert("RGB"))).all()


# -- transparency ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_transparency_is_on_white(mode: str) -> None:
    image = PIL.Image.new("RGBA", (2, 1), (40, 40, 40, 255))
    image.putpixel((1, 0), (40, 40, 40, 0))
    if mode == "La":
        image = image.convert("LA").convert("La")
    elif mode == "PA":
        alpha, image = image.getchannel("A"), PIL.Image.new("P", (2, 1), 1)
        image.putpalette([0, 0, 0, 40, 40, 40])
        image.putalpha(alpha)
        assert image.mode == "PA"
    else:
        image = image.convert(mode)
    assert grey(image).tolist() == [[40, 255]]


def test_half_transparency_is_half_white() -> None:
    assert read(PIL.Image.new("RGBA", (1, 1), (200, 0, 100, 128))).tolist() == [[[227, 127, 177]]]


@pytest.mark.parametrize(
    ("mode", "colour"), [("L", 7), ("RGB", (7, 8, 9)), ("P", 1), ("I;16", 700), ("1", 0)]
)
def test_a_transparent_colour(mode: str, colour: Any) -> None:
    image = PIL.Image.new(mode, (2, 1), colour)
    image.putpixel((1, 0), 0 if mode != "1" else 1)
    if mode == "P":
        image.putpalette([9, 9, 9, 40, 50, 60])
    file = encoded(image, "PNG", transparency=colour)
    for given_as in (file, loaded(file)):
        assert read(given_as)[0, 0].tolist() == [255, 255, 255]
    if mode != "1":
        assert read(file)[0, 1].max() < 10


# -- the right way up ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_turned_pictures_are_upright_however_they_come(
    tmp_path: Path, kind: str, turn: int
) -> None:
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = turn
    # Blocks of 16 pixels, which a JPEG keeps apart.
    small = np.random.default_rng(turn).integers(0, 256, (2, 3), dtype=np.uint8)
    pixels = np.kron(small, np.ones((16, 16), dtype=np.uint8))
    more = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(PIL.Image.fromarray(pixels).convert("RGB"), kind, exif=exif, **more)
    file = tmp_path / f"i.{kind.lower()}"
    file.write_bytes(data)
    first = read(data)
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.T,
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].T,
        8: np.rot90(pixels),
    }[turn]
    assert np.abs(first - upright[..., None].astype(int)).max() <= 3
    for name, way in WAYS.items():
        assert (read(way(data, file)) == first).all(), name
    rows = from_dataset(
        datasets.Dataset.from_dict(
            {"image": [{"bytes": data, "path": None}, {"bytes": None, "path": str(file)}]}
            | {"question": ["q", "q"]}
        ).cast_column("image", datasets.Image())
    )
    (tmp_path / "s.jsonl").write_text(f'{{"image": "{file.name}", "question": "q"}}')
    for sample in (*rows, *from_jsonl(tmp_path / "s.jsonl")):
        assert (read(sample.image) == first).all()
    assert (read(Sample("a", data, "q").load_image()) == first).all()  # not turned twice


def test_16_bits_are_turned_too() -> None:
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = 6
    image = PIL.Image.fromarray(np.rint(RAMP[:8] * 65535).astype(np.uint16))
    assert (grey(encoded(image, "PNG", exif=exif)) == np.rot90(GREY[:8], -1)).all()


def test_the_image_given_stays_as_it_was() -> None:
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = 6
    image = loaded(encoded(PIL.Image.new("RGB", (40, 20)), "JPEG", exif=exif))
    for _ in range(2):
        assert Sample("a", image, "q").load_image().size == (20, 40)
    assert (image.size, image.getexif()[ORIENTATION]) == ((40, 20), 6)


# -- what is not opened ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["i.jpg", "i.png", "i.eps"])
def test_postscript_starts_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / name).write_bytes(program)
    started: list[Any] = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: started.append(a))
    for image in (tmp_path / name, program):
        assert "not one of" in refused(image)
    assert started == []


def test_every_format_that_is_allowed_is_pillows_own() -> None:
    PIL.Image.init()
    assert set(_images.FORMATS) - set(PIL.Image.OPEN) <= {"AVIF", "JPEG2000", "WEBP"}
    assert {"EPS", "WMF", "FITS", "GRIB", "HDF5"}.isdisjoint(_images.FORMATS)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"])
def test_every_format_is_opened(kind: str) -> None:
    assert grey(encoded(PIL.Image.new("RGB", (32, 32), "white"), kind)).min() >= 250


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    pipe, link, plug = tmp_path / "p.png", tmp_path / "l.png", tmp_path / "s.png"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(plug))
        places = [pipe, link, plug, Path("/dev/zero"), Path("/dev/tty")]
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.extend(map(refused, places)), daemon=True)
        thread.start()
        thread.join(20)
    assert len(found) == len(places)
    assert all("not a file" in text for text in found)
    assert "it is a folder" in refused(tmp_path)


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 300, "\ud800.png", "i\udce9.png"])
def test_names_that_no_file_has(name: str) -> None:
    text = refused(name)
    assert text.encode()  # printable, whatever the name
    assert "OSError" in text or "there is no such file" in text


@pytest.mark.parametrize("size", [(1, 50_000), (50_000, 1), (3, 20_000), (1, 257), (0, 5)])
def test_pictures_too_long_for_their_width(size: tuple[int, int]) -> None:
    image = PIL.Image.new("L", size)
    assert f"has {size[0]} × {size[1]} pixels, more than 256 times" in refused(image)
    if 0 not in size:
        assert "more than 256 times" in refused(encoded(image, "PNG"))


@pytest.mark.parametrize("size", [*SIZES.values(), (256, 1), (20_000, 400)])
def test_panoramas_pass(size: tuple[int, int]) -> None:
    assert Sample("a", encoded(PIL.Image.new("L", size), "PNG"), "q").load_image().size == size


def test_decompression_bombs() -> None:
    bomb = encoded(PIL.Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 100_000
    assert "more than 178956970 pixels" in refused(bomb)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF data
@settings(deadline=None)
@given(st.binary(max_size=200))
def test_bytes_are_a_picture_or_refused(data: bytes) -> None:
    for start in (b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"\xff\xd8\xff", b"P6 "):
        try:
            found = Sample("a", start + data, "q").load_image()
        except InputError:
            continue
        assert found.mode == "RGB"
