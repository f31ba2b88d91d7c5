"""Reads a GGUF file: its metadata, and its tensors as float32.

Such a file may store numbers in many forms; only those are read that the package of
`training/real_language_model.py` uses: F32, Q4_1 and Q8_0. The format is described in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

BLOCK = 32
"""How many numbers share a scale in Q4_1 and Q8_0."""

_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_TEXT, _LIST = 8, 9
_MAX_DIMENSIONS = 4


def f32(raw: Bytes) -> Floats:
    """Numbers that are stored as they are."""
    return raw.view("<f4").astype(np.float32)


def q4_1(raw: Bytes) -> Floats:
    """Numbers of 4 bits: in every 20 bytes a scale d, a least value m, and 32 numbers q; d · q + m.

    The low halves of the 16 bytes are the first 16 numbers, the high halves the other 16.
    """
    blocks = raw.reshape(-1, 4 + BLOCK // 2)
    scale, least = blocks[:, :4].copy().view("<f2").astype(np.float32).T
    packed = blocks[:, 4:]
    numbers = np.concatenate([packed & 15, packed >> 4], 1).astype(np.float32)
    found: Floats = (numbers * scale[:, None] + least[:, None]).reshape(-1)
    return found


def q8_0(raw: Bytes) -> Floats:
    """Numbers of 8 bits: in every 34 bytes a scale d and 32 signed numbers q; d · q."""
    blocks = raw.reshape(-1, 2 + BLOCK)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    found: Floats = (blocks[:, 2:].view(np.int8).astype(np.float32) * scale).reshape(-1)
    return found


# For each form's number in the file: its name, bytes and numbers of a block, and the reader.
_FORMS: dict[int, tuple[str, int, int, Callable[[Bytes], Floats]]] = {
    0: ("F32", 4, 1, f32),
    3: ("Q4_1", 4 + BLOCK // 2, BLOCK, q4_1),
    8: ("Q8_0", 2 + BLOCK, BLOCK, q8_0),
}


@dataclass(frozen=True)
class GGUF:
    """An opened file.

    Attributes:
        path: Where it is.
        about: What it says about itself, such as ``{"llama.block_count": 30}``.
        places: For the name of each tensor, its shape, the number of its form and its first byte.
    """

    path: Path
    about: dict[str, Any]
    places: dict[str, tuple[tuple[int, ...], int, int]]

    def tensor(self, name: str) -> Floats:
        """One tensor in float32, its slowest axis first (``(out, in)`` for a linear layer).

        Raises:
            ValueError: There is no such tensor, it is in a form that is not read here, or the file
                ends within it.
        """
        if name not in self.places:
            raise ValueError(f"{self.path.name} has no tensor {name}.")
        shape, form, first = self.places[name]
        if form not in _FORMS:
            known = ", ".join(label for label, *_ in _FORMS.values())
            raise ValueError(f"{name} is in form {form} of GGUF; only {known} are read here.")
        label, width, numbers, read = _FORMS[form]
        n = int(np.prod(shape))
        if n % numbers:
            raise ValueError(f"{name} has {n} numbers, no whole blocks of {label}.")
        size = n // numbers * width
        raw = np.fromfile(self.path, np.uint8, size, offset=first)
        if len(raw) < size:
            raise ValueError(f"{self.path.name} ends within {name}; take the file anew.")
        return read(raw).reshape(shape)


def read(path: Path) -> GGUF:
    """Open a file: read all but the tensors.

    Raises:
        ValueError: It is no GGUF file of version 3, or it ends too soon.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path.name} is not a GGUF file.")
        try:
            version, tensors, entries = _take(file, "IQQ")
            if version != 3:
                raise ValueError(f"{path.name} is of version {version} of GGUF; 3 is read here.")
            about = {_text(file): _value(file, _take(file, "I")[0]) for _ in range(entries)}
            places = dict(_place(file) for _ in range(tensors))
        except struct.error:
            raise ValueError(f"{path.name} ends too soon; take the file anew.") from None
        alignment = int(about.get("general.alignment", 32))
        data = -(-file.tell() // alignment) * alignment
    return GGUF(
        path, about, {name: (shape, form, data + at) for name, (shape, form, at) in places.items()}
    )


def _take(file: BinaryIO, form: str) -> tuple[Any, ...]:
    form = "<" + form
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _text(file: BinaryIO) -> str:
    return file.read(_take(file, "Q")[0]).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind == _LIST:
        of, n = _take(file, "IQ")
        return [_value(file, of) for _ in range(n)]
    if kind not in _NUMBERS:
        raise ValueError(f"GGUF has no kind of value {kind}; the file is damaged.")
    return _take(file, _NUMBERS[kind])[0]


def _place(file: BinaryIO) -> tuple[str, tuple[tuple[int, ...], int, int]]:
    """Name, shape, form and place of the next tensor; the file has its fastest axis first."""
    name, dimensions = _text(file), _take(file, "I")[0]
    if dimensions > _MAX_DIMENSIONS:
        raise ValueError(f"{name} has {dimensions} dimensions; the file is damaged.")
    shape = _take(file, f"{dimensions}Q")
    form, at = _take(file, "IQ")
    return name, (shape[::-1], form, at)
