"""Files of calibrated corrections, for one stage or for several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pore._saved.saved import Saved
from pore.bias.any_size import AnySizeBias
from pore.bias.position_bias import FILENAME, PositionBias
from pore.bias.stages import load_stages, save_biases
from pore.corrections.heads import HeadBiases

Calibrated = PositionBias | AnySizeBias | HeadBiases
"""A calibrated correction, which can be saved in a file."""


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
    return save_biases(path, corrections)


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
    found: tuple[Any, ...] = load_stages(
        _Any, repo_id_or_path, filename, revision=revision, token=token
    )
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
