"""What all JSON documents of one schema have in common; compared before one is made use of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pore._saved.seals import check, content
from pore.errors import PoreError

Types = type | tuple[type, ...]


_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Form:
    """What a document of one schema must hold.

    Attributes:
        schema: Its entry "schema", such as "pore.position_bias".
        what: What a file of it is, in the words of messages: "position bias".
        error: The error that is raised for a file that is none.
        entries: The type of every other entry, but for the version and the checksum.
        most: The largest size of a file, in bytes.
        absent: Entries that older files lack, with the values that they then have.
        elsewhere: Schemas of files that may be taken for one of these, with what to do instead.
        version: The version that is written, and the only one that is read.
    """

    schema: str
    what: str
    error: type[PoreError]
    entries: Mapping[str, Types]
    most: int = 64 << 20
    absent: Mapping[str, Any] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    version: int = 1

    def document(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """The document of these entries, without a checksum."""
        return {"schema": self.schema, "version": self.version, **entries}

    def read(self, document: Any, make: Callable[[dict[str, Any]], _Made]) -> _Made:
        """What is made of a document's entries.

        Args:
            document: JSON of any origin.
            make: Makes it, of entries whose types are right; raises ValueError for those whose
                values are not.

        Raises:
            ValueError: It is no such document, or not as it was saved. The checksum is compared
                last, since other messages say more.
        """
        entries = self._entries(document)
        for name, types in self.entries.items():
            # True and False are whole numbers to Python.
            if not isinstance(entries[name], types) or isinstance(entries[name], bool):
                raise ValueError(f"the field {name} is {brief(entries[name])}, of a wrong type.")
        made = make(entries)
        check(document)
        return made

    def _entries(self, document: Any) -> dict[str, Any]:
        schema = document.get("schema") if isinstance(document, dict) else None
        if isinstance(schema, str) and schema in self.elsewhere:
            raise ValueError(self.elsewhere[schema])
        if schema != self.schema:
            raise ValueError(f'there is no "schema": "{self.schema}".')
        version = document.get("version")
        if type(version) is not int or version != self.version:
            raise ValueError(
                f"it is of version {brief(version)}, and this pore reads version {self.version}. "
                "Update pore, or calibrate again."
            )
        found = {**self.absent, **content(document)}
        del found["schema"], found["version"]
        if found.keys() != self.entries.keys():
            wrong = sorted(found.keys() ^ self.entries.keys())
            raise ValueError(f"missing or unknown fields: {brief(wrong)}.")
        return found

    @contextmanager
    def naming(self, file: str) -> Iterator[None]:
        """Say of whatever is wrong which file it is wrong with.

        Args:
            file: The file, in words that begin a sentence.
        """
        try:
            yield
        except OSError as error:
            raise self.error(
                f"Cannot read the {self.what} {file}: {error.strerror or error}."
            ) from error
        except ValueError as error:
            raise self.error(f"{file} is no {self.what}, or damaged: {error}") from error


def whole_numbers(value: list[Any] | None, name: str) -> tuple[int, int] | None:
    """Two whole numbers of a JSON list, or None where there is none; else ValueError."""
    if value is None:
        return None
    if len(value) != 2 or not all(type(each) is int for each in value):
        raise ValueError(f"{name} must be two whole numbers, not {brief(value)}.")
    return value[0], value[1]


def floats(value: list[Any], count: int, name: str) -> list[float]:
    """The numbers of a JSON list, or ValueError."""
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries where there should be {count}.")
    for number in value:
        if type(number) not in (int, float):
            raise ValueError(f"{name} holds {brief(number)}, which is not a number.")
    try:
        return [float(number) for number in value]
    except OverflowError as error:
        raise ValueError(f"{name} holds a number that is out of range.") from error


def brief(value: object) -> str:
    """A value for a message, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
