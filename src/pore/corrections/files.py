"""Files of calibrated corrections, for one stage or for several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pore._files import shown, write_atomic
from pore._saved.forms import Form
from pore._saved.hub import fetched
from pore._saved.parsing import read_json
from pore._saved.saved import Saved
from pore._saved.seals import sealed_text
from pore._saved.stages import STAGES, document_of, stages_of
from pore.bias.any_size import AnySizeBias
from pore.bias.position_bias import FILENAME, SEVERAL, PositionBias
from pore.corrections.heads import HeadBiases
from pore.errors import ProfileError

Calibrated = PositionBias | AnySizeBias | HeadBiases


"""A calibrated correction, which can be saved in a file."""


_FORM = Form(schema=SEVERAL, what="position bias", error=ProfileError, entries=STAGES)


def save_corrections(path: str | os.PathLike[str], corrections: Sequence[Calibrated]) -> Path:
    """Write the corrections of all stages of a host method to one JSON file, whole or not at all.

    Args:
        path: The file; missing folders are made.
        corrections: One for every stage.

    Returns:
        The path written.

    Raises:
        ProfileError: There is none.
        OSError: It cannot be written.
    """
    return write_atomic(path, sealed_text(document_of(_FORM, corrections)))


def load_corrections(
    repo_id_or_path: str | os.PathLike[str],
    *,
    filename: str = FILENAME,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[Calibrated, ...]:
    """Read what `save_corrections`, or `save` of one, wrote: from the hub, a folder or a file.

    Args:
        repo_id_or_path: "owner/name" of a model repository, or a local folder or file.
        filename: Path of the file in the repository or folder.
        revision: Branch, tag or commit of the repository.
        token: Access token; None for the one of your login.

    Returns:
        One correction for every stage.

    Raises:
        ProfileError: It cannot be found or read.
    """
    path = fetched(_FORM, repo_id_or_path, filename, revision=revision, token=token)
    with _FORM.naming(shown(path)):
        found: tuple[Any, ...] = stages_of(_FORM, read_json(path, _FORM.most), _Any)
        return found


class _Any(Saved):
    """Reads whichever kind of correction a document holds."""

    @classmethod
    def of_document(cls, document: Any) -> Any:
        schema = document.get("schema") if isinstance(document, dict) else None
        for kind in (AnySizeBias, HeadBiases):
            if schema == kind._form.schema:
                return kind.of_document(document)
        return PositionBias.of_document(document)
