"""Files on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from typing_extensions import Self

from pore._saved.forms import Form
from pore._saved.saved import Saved


class OnHub(Saved):
    """A value that can also be saved in a model repository of the hub, as `_filename`."""

    _filename: ClassVar[str]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        filename: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload it to a model repository of the Hugging Face hub, which is created if missing.

        Args:
            repo_id: "owner/name".
            filename: Path of the file in the repository; None for the usual one.
            private: Whether a repository made here is private; None for the owner's default.
            revision: The branch to commit to.
            commit_message: The commit's message; None for a default that names the kind of file.
            token: Access token; None for the one of your login.

        Returns:
            The address of the commit.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: The hub refused.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_file(
            path_or_fileobj=self.to_json().encode(),
            path_in_repo=filename or self._filename,
            repo_id=repo_id,
            revision=revision,
            commit_message=commit_message or f"Add a {self._form.what} for PoRe",
        )
        return str(commit.commit_url)

    @classmethod
    def from_pretrained(
        cls,
        repo_id_or_path: str | os.PathLike[str],
        *,
        filename: str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> Self:
        """Read it from the Hugging Face hub, a folder or a file.

        Args:
            repo_id_or_path: "owner/name" of a model repository, or a local folder or file.
            filename: Path of the file in the repository or folder; None for the usual one.
            revision: Branch, tag or commit of the repository.
            token: Access token; None for the one of your login.

        Returns:
            What the file holds.

        Raises:
            PoreError: It cannot be found or read.
        """
        name = filename or cls._filename
        return cls.load(fetched(cls._form, repo_id_or_path, name, revision=revision, token=token))


def fetched(
    form: Form,
    repo_id_or_path: str | os.PathLike[str],
    filename: str,
    *,
    revision: str | None,
    token: str | None,
) -> str | os.PathLike[str]:
    """A local path, or the path of the file downloaded from the hub.

    Args:
        form: What the file should be.
        repo_id_or_path: As in `OnHub.from_pretrained`.
        filename: As in `OnHub.from_pretrained`.
        revision: As in `OnHub.from_pretrained`.
        token: As in `OnHub.from_pretrained`.

    Raises:
        PoreError: There is no such file.
    """
    local = Path(repo_id_or_path)
    # Not pathlib's functions, which raise errors for names that no file can have.
    if os.path.isdir(local):
        return local / filename
    if os.path.exists(local) or local.suffix == ".json":
        return local

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    repo_id = os.fspath(repo_id_or_path)
    try:
        return hf_hub_download(repo_id, filename, revision=revision, token=token)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise form.error(
            f"No {form.what} {filename} of {repo_id!r}: it is not a local path, and the hub "
            f"answers: {error}"
        ) from error
