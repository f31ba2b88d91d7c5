"""A GGUF file is read to the number; one that cannot be read is refused in words."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf_file
import numpy as np
import pytest

F32, Q4_1, Q8_0 = 0, 3, 8


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words)) + words.encode()


def written(path: Path, tensors: dict[str, tuple[tuple[int, ...], int, bytes]]) -> Path:
    """A file with a number, a text and a list about itself, and tensors (shape, form, data)."""
    entries = [
        text("count") + struct.pack("<II", 4, 7),
        text("name") + struct.pack("<I", 8) + text("tiny"),
        text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b c"),
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries)
    data = b""
    for name, (shape, form, numbers) in tensors.items():
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += text(name) + sizes + struct.pack("<IQ", form, len(data))
        data += numbers + b"\0" * (-len(numbers) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def test_what_it_says_about_itself(tmp_path: Path) -> None:
    file = gguf_file.read(written(tmp_path / "a.gguf", {}))
    assert file.about == {"count": 7, "name": "tiny", "tokens": ["a", "b c"]}


def test_numbers_as_they_are(tmp_path: Path) -> None:
    numbers = np.arange(6, dtype="<f4").reshape(2, 3)
    path = written(tmp_path / "a.gguf", {"w": ((2, 3), F32, numbers.tobytes())})
    np.testing.assert_array_equal(gguf_file.read(path).tensor("w"), numbers)


def test_numbers_of_8_bits(tmp_path: Path) -> None:
    packed = np.arange(-32, 32, dtype=np.int8).reshape(2, 32)
    blocks = b"".join(
        struct.pack("<e", d) + row.tobytes() for d, row in zip((0.5, 2), packed, strict=True)
    )
    path = written(
        tmp_path / "a.gguf",
        {"other": ((2,), F32, b"\0" * 8), "w": ((2, 32), Q8_0, blocks)},
    )
    wanted = packed * np.array([[0.5], [2]], np.float32)
    np.testing.assert_array_equal(gguf_file.read(path).tensor("w"), wanted)


def test_numbers_of_4_bits(tmp_path: Path) -> None:
    """The first 16 numbers are the low halves of the bytes, the other 16 the high ones."""
    numbers = np.random.default_rng(0).integers(0, 16, 32)
    halves = [int(low | high << 4) for low, high in zip(numbers[:16], numbers[16:], strict=True)]
    block = struct.pack("<ee", 0.25, -1.5) + bytes(halves)
    path = written(tmp_path / "a.gguf", {"w": ((1, 32), Q4_1, block)})
    np.testing.assert_array_equal(gguf_file.read(path).tensor("w")[0], numbers * 0.25 - 1.5)


def test_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"PK\3\4 and so on")
    with pytest.raises(ValueError, match=r"a\.gguf is not a GGUF file"):
        gguf_file.read(path)


def test_another_version(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 2, 0, 0))
    with pytest.raises(ValueError, match="of version 2"):
        gguf_file.read(path)


@pytest.mark.parametrize("there", [10, 60])
def test_a_file_that_ends_too_soon(tmp_path: Path, there: int) -> None:
    path = written(tmp_path / "a.gguf", {"w": ((2,), F32, b"\0" * 8)})
    path.write_bytes(path.read_bytes()[:there])
    with pytest.raises(ValueError, match="ends too soon"):
        gguf_file.read(path)


def test_a_tensor_that_ends_too_soon(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf", {"w": ((16,), F32, b"\0" * 64)})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="ends within w"):
        gguf_file.read(path).tensor("w")


def test_a_tensor_that_cannot_be_read(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.gguf",
        {"w": ((32,), 12, b"\0" * 20), "x": ((33,), Q4_1, b"\0" * 40)},
    )
    file = gguf_file.read(path)
    with pytest.raises(ValueError, match="has no tensor v"):
        file.tensor("v")
    with pytest.raises(ValueError, match="only F32, Q4_1, Q8_0 are read"):
        file.tensor("w")
    with pytest.raises(ValueError, match="no whole blocks of Q4_1"):
        file.tensor("x")
