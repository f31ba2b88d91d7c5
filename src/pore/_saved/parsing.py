"""JSON of any origin: bounded before it is built, and never more than can be written again."""

from __future__ import annotations

import json
import math
import os
from typing import Any, NoReturn

from pore._files import read_regular

MAX_DEPTH = 32


"""Levels of lists and objects in one another; nothing that pore writes has more than 8."""


MAX_VALUES = 1 << 22


"""Texts, numbers, lists and objects, together; built, each takes up to 100 bytes."""


_NAN = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def read_json(path: str | os.PathLike[str], most: int, *, values: int = MAX_VALUES) -> Any:
    """What a JSON file holds.

    Args:
        path: The file.
        most: Its largest size in bytes.
        values: As in `parse_json`.

    Returns:
        The document, as `parse_json` gives it.

    Raises:
        OSError: The file cannot be read, is no file, or is larger than that.
        ValueError: As in `parse_json`.
    """
    return parse_json(read_regular(path, most), values=values)


def parse_json(
    text: str | bytes, *, finite: bool = True, depth: int = MAX_DEPTH, values: int = MAX_VALUES
) -> Any:
    """What JSON text holds.

    Args:
        text: The text, as UTF-8 where it is bytes.
        finite: Whether to refuse NaN and infinity, which are Python's and not JSON's.
        depth: How many levels it may have at most.
        values: How many values it may hold at most.

    Returns:
        The document, with no key twice in one object, and with texts that UTF-8 can hold.

    Raises:
        ValueError: It is no JSON, or not like this; the message says what is wrong.
    """
    # A value comes after a comma or at the beginning of a list or an object, a key before a colon.
    # Those within texts count too; no file that pore writes comes near.
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
            raise ValueError(f"it holds {name}, and only finite numbers can be there.")
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
    """Refuse what is too deep, and half surrogate pairs, which escapes can write."""
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
                        f"it holds half of a surrogate pair in {value[:40]!a}, which is no text."
                    ) from error
        level, above = below, above + 1
