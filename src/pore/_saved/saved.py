"""Classes whose values are saved in JSON files."""

from __future__ import annotations

import os
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from pore._files import shown, write_atomic
from pore._saved.forms import Form
from pore._saved.parsing import parse_json, read_json
from pore._saved.seals import sealed_text


class Saved:
    """A value that can be saved: its class defines `_form`, `document` and `of_document`."""

    _form: ClassVar[Form]

    @abstractmethod
    def document(self) -> dict[str, Any]:
        """What a file holds, without the checksum."""

    @classmethod
    @abstractmethod
    def of_document(cls, document: Any) -> Self:
        """The value in a JSON document of any origin; ValueError if it holds none."""

    def to_json(self) -> str:
        """All of it as JSON text, with schema, version and a checksum."""
        return sealed_text(self.document())

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what `to_json` wrote.

        Args:
            text: The JSON text, or its bytes in UTF-8; everything in it is checked.

        Returns:
            What it holds.

        Raises:
            PoreError: This version cannot read it.
        """
        with cls._form.naming("This text"):
            return cls.of_document(parse_json(text))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to a JSON file, whole or not at all.

        Args:
            path: The file; missing folders are made.

        Returns:
            The path written.

        Raises:
            OSError: It cannot be written.
        """
        return write_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote; everything in it is checked.

        Args:
            path: The file.

        Returns:
            What it holds.

        Raises:
            PoreError: There is no such file, or it is damaged, too large, from another version or
                of another kind.
        """
        with cls._form.naming(shown(path)):
            return cls.of_document(read_json(path, cls._form.most))
