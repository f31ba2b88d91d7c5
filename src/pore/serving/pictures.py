"""Pictures of requests: from the request itself and, where the server allows it, from elsewhere."""

from __future__ import annotations

import base64
import binascii
import http.client
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pore._files import read_regular
from pore._images import open_image
from pore.errors import InputError
from pore.serving.requests import Limits, RequestError

if TYPE_CHECKING:
    import PIL.Image

_PATIENCE = 10.0  # seconds that another server may be silent

ANY_HOST = "*"
"""Allows every host, those of the server's own network among them."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A host that is allowed must not lead to one that is not."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Sources:
    """Where the pictures of requests may come from, beside the requests themselves.

    Attributes:
        hosts: Hosts that pictures are fetched from by http and https, such as "example.org" or
            "example.org:8080"; `ANY_HOST` allows all. Redirects are not followed.
        folder: Folder whose pictures requests may name by `file://` URLs; None allows no file.
    """

    hosts: tuple[str, ...] = ()
    folder: Path | None = None

    def read(self, url: str, limits: Limits) -> bytes:
        """The file of the picture that a URL means.

        Args:
            url: A data URL in base64, or an http, https or file URL where these are allowed.
            limits: How large it may be.

        Returns:
            Its bytes.

        Raises:
            RequestError: It is not allowed, not there, or too large.
        """
        most = limits.body_bytes
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return _data(url)
        if scheme in ("http", "https") and self.hosts:
            return self._fetched(url, most)
        if scheme == "file" and self.folder is not None:
            return self._file(url, most)
        allowed = [
            "data:image/...;base64,...",
            *(["http and https"] if self.hosts else []),
            *(["file"] if self.folder is not None else []),
        ]
        raise RequestError(
            f"Images come from URLs of the form {', '.join(allowed)} here, not from "
            f"{url[:80]!r}. (Others are allowed by --allow-host and --allow-folder.)"
        )

    def _fetched(self, url: str, most: int) -> bytes:
        """A picture from an allowed host."""
        try:
            host = urllib.parse.urlsplit(url).netloc.lower()
        except ValueError as error:
            raise RequestError(f"{url[:80]!r} is not a URL: {error}") from error
        if ANY_HOST not in self.hosts and host not in self.hosts:
            raise RequestError(f"Images are not fetched from {host[:80]!r} here.")
        # No proxy: the host that is allowed is the host that is asked.
        opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))
        try:
            with opener.open(url, timeout=_PATIENCE) as answer:
                data: bytes = answer.read(most + 1)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise RequestError(f"{url[:80]!r} cannot be fetched: {error}") from error
        if len(data) > most:
            raise RequestError(f"{url[:80]!r} has more than {most} bytes.", 413)
        return data

    def _file(self, url: str, most: int) -> bytes:
        """A picture in the allowed folder, whatever links lead where."""
        assert self.folder is not None
        parts = urllib.parse.urlsplit(url)
        folder = self.folder.resolve()
        try:
            path = Path(urllib.parse.unquote(parts.path)).resolve()
            if parts.netloc not in ("", "localhost") or not path.is_relative_to(folder):
                raise RequestError("Files are read from the allowed folder alone.")
            return read_regular(path, most)
        except (OSError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            # Without what the system says about it, which tells of other files.
            raise RequestError(f"There is no readable picture at {url[:80]!r}.") from error


def opened(files: Sequence[bytes], limits: Limits) -> list[PIL.Image.Image]:
    """The pictures of a request, as a viewer shows them.

    Args:
        files: Their files.
        limits: How large they may be.

    Returns:
        The pictures, see `open_image`.

    Raises:
        RequestError: One is too large or no picture, or all are too large together.
    """
    found: list[PIL.Image.Image] = []
    for data in files:
        try:
            found.append(open_image(data, most=limits.pixels))
        except InputError as error:
            raise RequestError(f"An image cannot be read: {error}") from error
        except Exception as error:  # decoders of damaged files raise all kinds of errors
            raise RequestError(
                f"An image cannot be read: {type(error).__name__}: {error}"
            ) from error
        if sum(image.width * image.height for image in found) > limits.pixels:
            raise RequestError(
                f"The images have more than {limits.pixels} pixels in all; make them smaller."
            )
    return found


def _data(url: str) -> bytes:
    """What a data URL holds."""
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError("A data URL of an image has the form data:image/...;base64,....")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"An image is not valid base64: {error}.") from error
