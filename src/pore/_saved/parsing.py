"""Reads JSON of any origin: its size is bounded before it is built, and it can be written again."""

from __future__ import annotations

import json
import math
import os
from typing import Any, NoReturn

from pore._files import open_regular, read_regular

MAX_DEPTH = 32
"""How deep lists and objects may be nested; nothing that pore writes has more than 8 levels."""

MAX_VALUES = 1 << 22
"""How many texts, numbers, lists and objects there may be; each takes up to 100 bytes."""

_NAN = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def read_json(path: str | os.PathLike[str], most: int, *, values: int = MAX_VALUES) -> Any:
    """What a JSON file holds.

    Args:
        path: The file.
        most: Its largest size in bytes.
        values: As in `parse_json`.

    Returns:
        The document, as from `parse_json`.

    Raises:
        OSError: The file cannot be read, is not a file, or is larger than that.
        ValueError: As in `parse_json`.
    """
    return parse_json(read_regular(path, most), values=values)


def says(path: str | os.PathLike[str], schema: str) -> bool:
    """Whether the beginning of a JSON file names a schema; whoever reads it checks what it gets.

    Args:
        path: The file.
        schema: Such as "pore.results".

    Raises:
        OSError: The file cannot be read, or is not a file.
    """
    with open_regular(path) as file:
        return f'"{schema}"'.encode() in file.read(256)


def parse_json(
    text: str | bytes, *, finite: bool = True, depth: int = MAX_DEPTH, values: int = MAX_VALUES
) -> Any:
    """What JSON text holds.

    Args:
        text: The text, or its bytes in UTF-8.
        finite: Whether to refuse NaN and infinity, which Python accepts but JSON does not have.
        depth: The largest number of levels.
        values: The largest number of values.

    Returns:
        The document. No object has a key twice, and UTF-8 can hold all texts.

    Raises:
        ValueError: It is not such JSON; the message says what is wrong.
    """
    # A value comes after a comma or at the beginning of a list or an object, a key before a colon.
    # Those within texts count too, but no file that pore writes comes near the limit.
    marks = ",[{:" if isinstance(text, str) else (b",", b"[", b"{", b":")
    if sum(map(text.count, marks)) > values:  # type: ignore[arg-type]
        raise ValueError(f"it holds more than {values} values.")
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise ValueError("it is not UTF-8 text.") from error

    def constant(name: str) -> float:
        if finite:
            raise ValueError(f"it holds {name}, but numbers must be finite.")
        return _NAN[name]

    def number(digits: str) -> float:
        return float(digits) if math.isfinite(float(digits)) else _too_large(digits)

    try:
        found = json.loads(
            text, parse_constant=constant, parse_float=number, object_pairs_hook=_object
        )
    except RecursionError as error:
        raise ValueError(f"it is nested too deeply: {error}.") from error
    _check(found, depth)
    return found


def _too_large(digits: str) -> NoReturn:
    raise ValueError(f"it holds the number {digits[:40]}, which is too large.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has the key {name[:40]!a} twice in one object.")
        found[name] = value
    return found


def _check(document: Any, depth: int) -> None:
    """Refuse nesting that is too deep, and half surrogate pairs, which escapes can make."""
    level, above = [document], 0
    while level:
        below: list[Any] = []
        for value in level:
            if above == depth and isinstance(value, (dict, list)):
                raise ValueError(f"it is nested too deeply: more than {depth} levels.")
            if isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str) and not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(
                        f"it holds half of a surrogate pair in {value[:40]!a}, which is not text."
                    ) from error
        level, above = below, above + 1
