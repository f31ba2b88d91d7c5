"""JSON documents with their own checksum, so that damage to a file is noticed.

The checksum is the SHA-256 of the document without it, as JSON with sorted keys and no spaces. It
covers the content: another layout of the same file does no harm, another digit does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

CHECKSUM = "checksum"
"""The key of the checksum."""


def seal(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document with its checksum, in the types that JSON gives back.

    Args:
        document: What JSON can hold, without a checksum.
    """
    plain: dict[str, Any] = json.loads(json.dumps(document))
    return {**plain, CHECKSUM: _checksum(plain)}


def content(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document without its checksum, which `check` compares."""
    return {key: value for key, value in document.items() if key != CHECKSUM}


def check(document: Mapping[str, Any]) -> None:
    """Refuse a document that is not as it was sealed; older files have no checksum.

    Readers check the content first, because messages about it say more.

    Args:
        document: As read from a file of any origin.

    Raises:
        ValueError: The checksum is not that of the content; the message says what to do.
    """
    if CHECKSUM in document and document[CHECKSUM] != _checksum(content(document)):
        raise ValueError(
            "its content does not match its checksum, so it is damaged, or was changed by hand. "
            'If you changed it and mean it, remove the entry "checksum" as well; otherwise get '
            "the file anew from where it came."
        )


def unseal(document: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a document that is as it was sealed; otherwise ValueError, as in `check`."""
    check(document)
    return content(document)


def sealed_text(document: Mapping[str, Any]) -> str:
    """The text of a file that holds a document, sealed: a line for each of its entries."""
    return f"{_text(seal(document))}\n"


def sealed_list(documents: Iterable[Mapping[str, Any]]) -> str:
    """The text of a file that holds a list of documents, each sealed by itself."""
    return json.dumps([seal(one) for one in documents], indent=2, allow_nan=False) + "\n"


def _text(document: Mapping[str, Any]) -> str:
    lines = (f" {json.dumps(key)}: {_value(value)}" for key, value in document.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def _value(value: Any) -> str:
    """A value on one line; a list of objects has a line for each of them."""
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        parts = (_text(one) if "schema" in one else json.dumps(one) for one in value)
        return "[\n" + ",\n".join(parts) + "\n]"
    return json.dumps(value)


def _checksum(plain: Mapping[str, Any]) -> str:
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
