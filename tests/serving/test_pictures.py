"""Pictures come from requests, and from elsewhere only where that is allowed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.serving import data_url, encoded, picture
from pore.serving.pictures import ANY_HOST, Sources, opened
from pore.serving.requests import Limits, RequestError

IMAGE = picture(9, 5)
LIMITS = Limits(body_bytes=10_000, pixels=1000)


def refused(sources: Sources, url: str, reason: str) -> RequestError:
    with pytest.raises(RequestError, match=reason) as found:
        opened([sources.read(url, LIMITS)], LIMITS)
    return found.value


def same(sources: Sources, url: str) -> bool:
    (image,) = opened([sources.read(url, LIMITS)], LIMITS)
    return bool((np.asarray(image) == np.asarray(IMAGE)).all())


def test_data_urls() -> None:
    nothing_else = Sources()
    assert same(nothing_else, data_url(IMAGE))
    refused(nothing_else, "data:image/png;base64,AAAA", "cannot be read: it is damaged")
    refused(nothing_else, "data:image/png;base64,?", "not valid base64")
    refused(nothing_else, "data:image/png,AAAA", "has the form data:image")
    refused(nothing_else, data_url(IMAGE)[:-40] + "====", "base64|cannot be read")
    refused(nothing_else, data_url(picture(100, 11)), "100 × 11 pixels, more than 1000")
    many = [encoded(picture(20, 20))] * 3
    assert len(opened(many[:2], LIMITS)) == 2
    with pytest.raises(RequestError, match="more than 1000 pixels in all"):
        opened(many, LIMITS)
    for url in ("http://localhost/a.png", "file:///etc/passwd", "/etc/passwd", "ftp://a/b", ""):
        refused(nothing_else, url, "not from")


def test_files_of_one_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside.png"
    inside.mkdir()
    for path in (inside / "a b.png", outside):
        path.write_bytes(encoded(IMAGE))
    (inside / "link.png").symlink_to(outside)
    (inside / "large.png").write_bytes(bytes(10_001))
    sources = Sources(folder=inside)
    assert same(sources, f"file://{inside}/a%20b.png")
    for name in ("../outside.png", "%2e%2e/outside.png", "link.png"):
        refused(sources, f"file://{inside}/{name}", "from the allowed folder alone")
    refused(sources, f"file://other{inside}/a%20b.png", "from the allowed folder alone")
    for name in ("none.png", "large.png", "", "%00"):
        refused(sources, f"file://{inside}/{name}", "no readable picture|allowed folder")
    refused(sources, "http://localhost/a.png", "of the form data:image/.*, file here")


class _Host(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("location", "/image")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        self.wfile.write(bytes(10_001) if self.path == "/large" else encoded(IMAGE))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def host() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Host)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_allowed_hosts(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # would not answer
    for sources in (Sources((host,)), Sources((ANY_HOST,))):
        assert same(sources, f"http://{host}/image")
        refused(sources, f"http://{host}/moved", "cannot be fetched: HTTP Error 302")
        refused(sources, f"http://{host}/none", "404")
        assert refused(sources, f"http://{host}/large", "more than 10000 bytes").status == 413
        refused(sources, "http://[", "not a URL")
        for path in ("a b", "a\r\nHost: b", "\x7f", "\xe9"):
            refused(sources, f"http://{host}/{path}", "cannot be fetched|not fetched from")
    refused(Sources((ANY_HOST,)), "http://127.0.0.1 x/image", "cannot be fetched")
    sources = Sources((host,))
    refused(sources, "http://127.0.0.1/image", "not fetched from '127.0.0.1'")
    refused(sources, f"http://{host}@127.0.0.1/image", "not fetched from")
    refused(sources, "file:///etc/passwd", "not from")
