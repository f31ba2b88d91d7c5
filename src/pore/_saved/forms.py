"""What all JSON documents of one schema have in common; checked before a document is used."""

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
        what: What messages call it, such as "position bias".
        error: The error that is raised for a file that is not one.
        entries: The type of every other entry, except for the version and the checksum.
        most: The largest size of a file, in bytes.
        absent: Entries that are missing in older files, with their default values.
        elsewhere: Schemas of files that may be mistaken for this one, with what to do instead.
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
        """Make a value from a document's entries.

        Args:
            document: JSON of any origin.
            make: Makes the value from entries of the right types; raises ValueError if their values
                are wrong.

        Raises:
            ValueError: It is not such a document, or was changed since it was saved. The checksum
                is compared last, because other messages say more.
        """
        entries = self._entries(document)
        for name, types in self.entries.items():
            # In Python True and False are whole numbers.
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
            is_not = (
                'its "schema" is not' if schema is None else f'its "schema" is {brief(schema)}, not'
            )
            raise ValueError(f'{is_not} "{self.schema}".')
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
        """Name the file in every error.

        Args:
            file: The file, in words that can begin a sentence.
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
    """The two whole numbers of a JSON list; None for None, ValueError for anything else."""
    if value is None:
        return None
    if len(value) != 2 or not all(type(each) is int for each in value):
        raise ValueError(f"{name} must be two whole numbers, not {brief(value)}.")
    return value[0], value[1]


def floats(value: list[Any], count: int, name: str) -> list[float]:
    """The numbers of a JSON list; ValueError if it holds anything else."""
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
