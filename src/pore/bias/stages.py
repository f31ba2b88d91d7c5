"""The position biases of a method with several stages, in one file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pore._files import shown, write_atomic
from pore._saved.forms import Form
from pore._saved.hub import fetched
from pore._saved.parsing import read_json
from pore._saved.saved import Saved
from pore._saved.seals import sealed_text
from pore._saved.stages import STAGES, document_of, stages_of
from pore.bias.position_bias import FILENAME, SEVERAL, PositionBias
from pore.errors import ProfileError

_FORM = Form(schema=SEVERAL, what="position bias", error=ProfileError, entries=STAGES)


_One = TypeVar("_One", bound=Saved)


def save_biases(path: str | os.PathLike[str], biases: Sequence[Saved]) -> Path:
    """Write the biases of all stages of a host method to one JSON file, whole or not at all.

    Args:
        path: The file; missing folders are made.
        biases: One for every stage; a single one is written as by `PositionBias.save`.

    Returns:
        The path written.

    Raises:
        ProfileError: There is none.
        OSError: It cannot be written.
    """
    return write_atomic(path, sealed_text(document_of(_FORM, biases)))


def load_biases(
    repo_id_or_path: str | os.PathLike[str],
    *,
    filename: str = FILENAME,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[PositionBias, ...]:
    """Read what `save_biases` or `PositionBias.save` wrote, from the hub, a folder or a file.

    Args:
        repo_id_or_path: "owner/name" of a model repository, or a local folder or file.
        filename: Path of the file in the repository or folder.
        revision: Branch, tag or commit of the repository.
        token: Access token; None for the one of your login.

    Returns:
        One bias for every stage.

    Raises:
        ProfileError: It cannot be found or read.
    """
    where = repo_id_or_path, filename
    return load_stages(PositionBias, *where, revision=revision, token=token)


def load_stages(
    kind: type[_One],
    repo_id_or_path: str | os.PathLike[str],
    filename: str,
    *,
    revision: str | None,
    token: str | None,
) -> tuple[_One, ...]:
    """The same for another kind of correction.

    Args:
        kind: What every stage has.
        repo_id_or_path: As in `load_biases`.
        filename: As in `load_biases`.
        revision: As in `load_biases`.
        token: As in `load_biases`.

    Returns:
        One for every stage.

    Raises:
        ProfileError: It cannot be found or read.
    """
    path = fetched(_FORM, repo_id_or_path, filename, revision=revision, token=token)
    with _FORM.naming(shown(path)):
        return stages_of(_FORM, read_json(path, _FORM.most), kind)
