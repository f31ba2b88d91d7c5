"""One document for all stages of a method; for a single stage, just the document of that stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pore._saved.forms import Form
from pore._saved.saved import Saved
from pore._saved.seals import seal

STAGES = {"stages": list}
"""The entries of a document with several stages."""

_MOST = 1 << 10


_One = TypeVar("_One", bound=Saved)


def document_of(form: Form, stages: Sequence[Saved]) -> dict[str, Any]:
    """The document of all stages, or of the only one.

    Args:
        form: The form of a document with several stages.
        stages: The value of each stage.

    Raises:
        PoreError: There is none, or more than can be read again.
    """
    if not 1 <= len(stages) <= _MOST:
        raise form.error(f"A host has 1 to {_MOST} stages, not {len(stages)}.")
    if len(stages) == 1:
        return stages[0].document()
    return form.document({"stages": [seal(stage.document()) for stage in stages]})


def stages_of(form: Form, document: Any, kind: type[_One]) -> tuple[_One, ...]:
    """What a document holds that has several stages or a single one.

    Args:
        form: The form of a document with several stages.
        document: JSON of any origin.
        kind: The class of the value of every stage.

    Raises:
        ValueError: It is neither.
    """
    if not isinstance(document, dict) or document.get("schema") != form.schema:
        return (kind.of_document(document),)

    def made_of(entries: dict[str, Any]) -> tuple[_One, ...]:
        if not 1 <= len(entries["stages"]) <= _MOST:
            raise ValueError(f"there must be 1 to {_MOST} stages.")
        return tuple(map(kind.of_document, entries["stages"]))

    return form.read(document, made_of)
