"""The position biases of a method with several stages, in one folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pore._files import write_atomic
from pore._saved.seals import content, seal, sealed_text
from pore.bias.position_bias import (
    _HOST_SCHEMA,
    _MAX_STAGES,
    _VERSION,
    FILENAME,
    PositionBias,
    _check_sum,
    _decode,
    _document,
    _find,
    _read,
)
from pore.errors import ProfileError


def save_biases(path: str | os.PathLike[str], biases: Sequence[PositionBias]) -> Path:
    """Write the biases of all stages of a host method to one JSON file, whole or not at all.

    Args:
        path: The file; missing folders are made.
        biases: One for every stage; a single one is written as `PositionBias.save` does.

    Returns:
        The path written.

    Raises:
        ProfileError: There is none.
        OSError: It cannot be written.
    """
    if not 1 <= len(biases) <= _MAX_STAGES:
        raise ProfileError(f"A host has 1 to {_MAX_STAGES} stages, not {len(biases)}.")
    if len(biases) == 1:
        return biases[0].save(path)
    stages = [seal(bias._document()) for bias in biases]
    document = {"schema": _HOST_SCHEMA, "version": _VERSION, "stages": stages}
    return write_atomic(path, sealed_text(document))


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
        token: Access token; None for the one logged in with.

    Returns:
        One bias for every stage.

    Raises:
        ProfileError: It cannot be found or read.
    """

    def decode(text: bytes) -> tuple[PositionBias, ...]:
        document = _document(text)
        if not isinstance(document, dict) or document.get("schema") != _HOST_SCHEMA:
            return (_decode(document),)
        stages = document.get("stages")
        if (
            content(document).keys() != {"schema", "version", "stages"}
            or document["version"] != _VERSION
            or not isinstance(stages, list)
            or not 1 <= len(stages) <= _MAX_STAGES
        ):
            raise ProfileError(
                f"not the biases of a host of version {_VERSION}. Update pore, or calibrate again."
            )
        biases = tuple(map(_decode, stages))
        _check_sum(document)
        return biases

    return _read(_find(repo_id_or_path, filename, revision, token), decode)
