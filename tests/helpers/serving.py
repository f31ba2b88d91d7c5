"""Requests to a server, the server itself in a thread, and what a model keeps of its pruners."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from pore._compat.modules import HOOKS
from pore.changes import changes_in

CHAT = "/v1/chat/completions"
QUESTION = "w6 w20"


def picture(width: int = 32, height: int = 32, seed: int = 0) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def encoded(image: PIL.Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def data_url(image: PIL.Image.Image, form: str = "PNG") -> str:
    text = base64.b64encode(encoded(image, form)).decode()
    return f"data:image/{form.lower()};base64,{text}"


def body(*urls: str, question: str = QUESTION, **more: Any) -> dict[str, Any]:
    """A request with images and a question; what is None is left out."""
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": question}]
    given = {"messages": [{"role": "user", "content": content}], "max_tokens": 5, **more}
    return {name: value for name, value in given.items() if value is not None}


class Reply(NamedTuple):
    """What a server answered."""

    status: int
    text: str
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def answer(self) -> str:
        return str(self.json["choices"][0]["message"]["content"])

    @property
    def reason(self) -> str:
        return str(self.json["error"]["message"])

    @property
    def events(self) -> list[Any]:
        """What a stream sent, without the mark of its end."""
        lines = self.text.strip().split("\n\n")
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    @property
    def streamed(self) -> str:
        """The text that a stream sent."""
        return "".join(event["choices"][0]["delta"].get("content", "") for event in self.events)


def call(address: str, route: str, given: Any = None) -> Reply:
    """Ask a server: GET, or POST of bytes or of what becomes JSON."""
    data = json.dumps(given).encode() if isinstance(given, dict) else given
    asked = urllib.request.Request(address + route, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=120) as found:
            return Reply(found.status, found.read().decode(), dict(found.headers))
    except urllib.error.HTTPError as error:
        return Reply(error.code, error.read().decode(), dict(error.headers))


@contextmanager
def running(server: Any) -> Iterator[str]:
    """A server in a thread, told to stop at the end; its address."""
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop()
        thread.join(120)
    assert not thread.is_alive()


def until(true: Any) -> None:
    """Wait until something is so."""
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def traces(model: Any) -> dict[str, Any]:
    """What a pruner would leave in a model: hooks, and attributes of single modules."""
    assert not list(changes_in(model))
    return {
        name: (sorted(vars(module)), *(sorted(getattr(module, each)) for each in HOOKS))
        for name, module in model.named_modules()
    }
