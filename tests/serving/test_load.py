"""Many clients at once, images of all sizes, some broken: who is answered what, and what stays."""

from __future__ import annotations

import base64
import gc
import resource
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pytest
import torch

import pore
from helpers.serving import (
    CHAT,
    Reply,
    body,
    call,
    data_url,
    encoded,
    picture,
    running,
    traces,
    until,
)
from pore._images import open_image
from pore.data.loading import load_model
from pore.data.prompts import build_inputs
from pore.data.samples import Sample
from pore.engine.pruner import Pruner
from pore.serving.requests import Limits
from pore.serving.served import Served

pytest.importorskip("openai", reason="needs the extra serve: .ci/serve runs this")
pytest.importorskip("fastapi", reason="needs the extra serve: .ci/serve runs this")
pytest.importorskip("uvicorn", reason="needs the extra serve: .ci/serve runs this")

from pore.serving.app import App
from pore.serving.running import Server

REQUESTS, CLIENTS, ROUNDS = 200, 16, 5
USUAL = 36
QUESTIONS = ("What color is the circle?", "How many squares are there?", "Is there a digit?")
FORMS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SIDES = (4, 7, 64, 96, 97, 336, 800, 1000)


class Case(NamedTuple):
    """A request, and what it must be answered: a text, or a refusal for a reason."""

    given: Any
    image: bytes | None = None
    keep: int | float = USUAL
    reason: str | None = None

    @property
    def question(self) -> str:
        return str(self.given["messages"][0]["content"][-1]["text"])


def fastv(keep: int | float) -> Pruner:
    return pore.FastV(keep=keep)


def url_of(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def good(rng: np.random.Generator, number: int) -> Case:
    form = FORMS[number % len(FORMS)]
    data = encoded(picture(*map(int, rng.choice(SIDES, 2)), seed=number), form)
    keep = (None, 1, 14, 0.5, 144)[number % 5]
    more: dict[str, Any] = {} if keep is None else {"keep": keep}
    more |= {"stream": bool(number % 2), "question": QUESTIONS[number % 3], "max_tokens": 6}
    if number % 11 == 0:
        return Case(body(**more), None, USUAL if keep is None else keep)
    return Case(body(url_of(data), **more), data, USUAL if keep is None else keep)


def bad(number: int) -> Case:
    image = picture(64, 48, seed=number)
    whole, url = encoded(image), data_url(image)
    cases = [
        Case(body(url_of(whole[: len(whole) // 2])), reason="cannot be read"),
        Case(body(url_of(whole[:20] + bytes(50))), reason="cannot be read"),
        Case(body(url_of(b"no picture at all")), reason="cannot be read"),
        Case(body(url_of(b"")), reason="cannot be read"),
        Case(body("data:image/png;base64,*"), reason="not valid base64"),
        Case(body(data_url(PIL.Image.new("L", (1001, 1000)))), reason="more than 1000000"),
        Case(body(data_url(picture(1, 300))), reason="more than 256 times as long as wide"),
        Case(body("http://169.254.169.254/latest/meta-data"), reason="not from 'http://"),
        Case(body("file:///etc/passwd"), reason="not from 'file:///"),
        Case(body(url, keep=145), reason="asks for more visual tokens"),
        Case(body(url, keep=-3), reason="would keep no"),
        Case(body(url, temperature=9), reason="temperature is a number"),
        Case(body(url, max_tokens=10**9), reason="max_tokens is a whole number"),
        Case(body(url, question="<image> <image>"), reason="stands for an image"),
        Case({"messages": "hello"}, reason="`messages` must be a list"),
        Case(b'{"messages":', reason="cannot be read as JSON"),
        Case(body("data:" + "A" * 9_000_000), reason="more than 8388608 bytes"),
    ]
    case = cases[number % len(cases)]
    if number % 2 and isinstance(case.given, dict):
        return case._replace(given={**case.given, "stream": True})
    return case


def cases() -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for number in range(REQUESTS):
        yield bad(number // 4) if number % 4 == 3 else good(rng, number)


def expected(served: Served, case: Case) -> str:
    """The answer without a server."""
    image = None if case.image is None else open_image(case.image)
    inputs = build_inputs(served.processor, [Sample("one", image, case.question)])
    with fastv(case.keep)(served.model):
        tokens = served.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return str(served.processor.decode(new, skip_special_tokens=True))


def check(served: Served, case: Case, reply: Reply) -> None:
    if case.reason is not None:
        assert 400 <= reply.status < 500
        assert case.reason in reply.reason
        return
    assert reply.status == 200, reply.text
    answer = reply.streamed if case.given["stream"] else reply.answer
    assert answer == expected(served, case)


def memory() -> tuple[int, int]:
    """Tensors that are alive, and the MiB of this process; 0 where the system does not say."""
    gc.collect()
    tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    found = Path("/proc/self/statm")
    pages = int(found.read_text().split()[1]) if found.exists() else 0
    return tensors, pages * resource.getpagesize() >> 20


@pytest.mark.slow
def test_load() -> None:
    model, processor = load_model("embedded", device="cpu")
    limits = Limits(body_bytes=8 << 20, pixels=1_000_000)
    served = Served("embedded", model, processor, fastv, USUAL, limits)
    served.try_out()
    before = traces(model)
    given = list(cases())
    size = REQUESTS // ROUNDS
    replies: list[Reply] = []
    taken: list[tuple[int, int]] = []
    with running(Server(App(served))) as address, ThreadPoolExecutor(CLIENTS) as clients:
        for start in range(0, REQUESTS, size):
            part = given[start : start + size]
            replies += clients.map(lambda case: call(address, CHAT, case.given), part)
            until(lambda: served.metrics.in_flight == 0)
            assert traces(model) == before
            taken.append(memory())
        counted = call(address, "/metrics").text
    # One tensor of every answer would be 120 more, an image of every one some hundred MiB. What was
    # asked last may not have been let go of yet.
    assert taken[-1][0] - taken[0][0] < 80
    assert taken[-1][1] - taken[1][1] < 100
    for status, count in Counter(reply.status for reply in replies).items():
        assert f'pore_requests_total{{status="{status}"}} {count}' in counted
    assert sum(case.reason is None for case in given) == 150
    for case, reply in zip(given, replies, strict=True):
        check(served, case, reply)
