"""The server over HTTP, as clients see it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

import pore
from helpers.calibrations import make_processor
from helpers.models import tiny_llava
from helpers.serving import CHAT, body, call, data_url, picture, running, traces, until
from pore.data.prompts import build_inputs
from pore.data.samples import Sample
from pore.engine.pruner import Pruner
from pore.serving.pictures import Sources
from pore.serving.requests import ChatRequest, Limits
from pore.serving.served import Generation, Served

pytest.importorskip("openai", reason="needs the extra serve: .ci/serve runs this")
pytest.importorskip("fastapi", reason="needs the extra serve: .ci/serve runs this")
pytest.importorskip("uvicorn", reason="needs the extra serve: .ci/serve runs this")

import openai

from pore.serving.app import App
from pore.serving.running import Server

IMAGE = picture()
URL = data_url(IMAGE)
LIMITS = Limits(body_bytes=200_000, waiting=20)


def fastv(keep: int | float) -> Pruner:
    return pore.FastV(keep=keep)


@pytest.fixture(scope="module")
def served() -> Served:
    model = tiny_llava(dtype=torch.float32).eval()
    one = Served("tiny", model, make_processor(do_center_crop=False), fastv, 4, LIMITS)
    one.try_out()
    return one


@pytest.fixture(scope="module")
def address(served: Served) -> Iterator[str]:
    with running(Server(App(served))) as found:
        yield found


def expected(served: Served, pruner: Pruner, question: str = "w6 w20", new: int = 5) -> str:
    inputs = build_inputs(served.processor, [Sample("one", IMAGE, question)], dtype=torch.float32)
    with pruner(served.model):
        tokens = served.model.generate(**inputs, max_new_tokens=new, do_sample=False)
    length = inputs["input_ids"].shape[1]
    return str(served.processor.decode(tokens[0, length:], skip_special_tokens=True))


class Held:
    """Generations wait until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Semaphore(0)
        self.go = threading.Event()
        generate = Generation.generate

        def held(generation: Generation, **given: Any) -> Any:
            self.begun.release()
            assert self.go.wait(60)
            return generate(generation, **given)

        monkeypatch.setattr(Generation, "generate", held)


def test_an_answer_and_its_stream(address: str, served: Served) -> None:
    wanted = expected(served, fastv(4))
    whole = call(address, CHAT, body(URL, model="tiny"))
    assert (whole.status, whole.answer) == (200, wanted)
    stream = call(address, CHAT, body(URL, stream=True))
    assert (stream.status, stream.streamed) == (200, wanted)
    assert len(stream.events) > 3
    for reply in (whole, stream):
        assert reply.headers["x-pore-visual-tokens-seen"] == "16"
        assert reply.headers["x-pore-visual-tokens-kept"] == "4"


def test_the_client_of_openai(address: str, served: Served) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    asked: Any = {**body(URL), "model": "tiny", "extra_body": {"keep": 2}}
    wanted = expected(served, fastv(2))
    found = client.chat.completions.create(**asked)
    assert found.choices[0].message.content == wanted
    assert found.usage.completion_tokens == 5
    pieces = client.chat.completions.create(**asked, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == wanted
    with pytest.raises(openai.BadRequestError, match="keep=0 would keep no visual token"):
        client.chat.completions.create(**{**asked, "extra_body": {"keep": 0}})
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.chat.completions.create(**{**asked, "model": "other"})
    client.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("given", "status", "reason"),
    [
        (b"nothing", 400, "cannot be read as JSON"),
        (body("data:image/png;base64,AAAA"), 400, "An image cannot be read"),
        (body("file:///etc/passwd"), 400, "not from 'file:///etc/passwd'"),
        (body(URL, keep=17), 400, "asks for more visual tokens"),
        (body(URL, question="an <image>"), 400, "stands for an image"),
        (body(URL, max_tokens=1020), 400, "takes 1024 in all"),
        (body("data:" + "A" * 200_000), 413, "more than 200000 bytes"),
        (body(URL, question="w6 " * 30_000), 400, "more than 65536 characters"),
        (body(URL, temperature=10**400), 400, "temperature is a number"),
    ],
)
def test_what_is_refused(address: str, given: Any, status: int, reason: str, stream: bool) -> None:
    if isinstance(given, dict):
        given = {**given, "stream": stream}
    reply = call(address, CHAT, given)
    assert (reply.status, reply.json["error"]["type"]) == (status, "invalid_request_error")
    assert reason in reply.reason


def test_other_addresses(address: str) -> None:
    assert call(address, "/reset", {}).status == 404
    assert call(address, "/v1/completions", {}).status == 404
    assert call(address, CHAT).status == 405
    assert call(address, "/health").json == {"status": "ok"}


def test_failures_of_the_server(
    address: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret")

    before = traces(served.model)
    with monkeypatch.context() as patched:
        patched.setattr(served.model.model.language_model.layers[3], "forward", fails)
        for stream in (False, True):
            reply = call(address, CHAT, body(URL, stream=stream))
            assert reply.status == 500
            assert reply.json["error"]["type"] == "server_error"
            assert "secret" not in reply.text
    assert traces(served.model) == before
    assert call(address, CHAT, body(URL)).answer == expected(served, fastv(4))


def test_metrics(address: str, served: Served) -> None:
    def numbers() -> dict[str, float]:
        lines = call(address, "/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    before = numbers()
    call(address, CHAT, body(URL, keep=3))
    call(address, CHAT, body(URL, keep=0))
    until(lambda: served.metrics.in_flight == 0)
    after = numbers()

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more('pore_requests_total{status="200"}') == 1
    assert more('pore_requests_total{status="400"}') == 1
    assert more("pore_visual_tokens_seen_total") == 16
    assert more("pore_visual_tokens_kept_total") == 3
    assert more("pore_prefill_seconds_count") == more("pore_generation_seconds_count") == 1
    assert 0 < more("pore_prefill_seconds_sum") < more("pore_generation_seconds_sum")
    assert after["pore_requests_in_flight"] == 0
    info = f'pore_info{{model="tiny",method="FastV",settings="{fastv(4)!r}"}}'
    assert info in after  # with the labels that the plug-in for vLLM has


def test_requests_at_a_time_do_not_see_each_other(address: str, served: Served) -> None:
    before = traces(served.model)
    asked = [(1 + i % 16, f"w{6 + i % 5} w20", bool(i % 3)) for i in range(20)]

    def ask(one: tuple[int, str, bool]) -> str:
        keep, question, stream = one
        reply = call(address, CHAT, body(URL, question=question, keep=keep, stream=stream))
        assert reply.status == 200
        assert reply.headers["x-pore-visual-tokens-kept"] == str(keep)
        return reply.streamed if stream else reply.answer

    with ThreadPoolExecutor(10) as threads:
        found = list(threads.map(ask, asked))
    assert found == [expected(served, fastv(keep), question) for keep, question, _ in asked]
    until(lambda: served.metrics.in_flight == 0)
    assert traces(served.model) == before


def test_more_than_may_wait(address: str, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    with ThreadPoolExecutor(20) as threads:
        waiting = [threads.submit(call, address, CHAT, body(URL)) for _ in range(20)]
        until(lambda: served.metrics.in_flight == 20)
        reply = call(address, CHAT, body(URL))
        held.go.set()
        assert {each.result().status for each in waiting} == {200}
    assert (reply.status, reply.reason) == (503, "20 requests wait already; try again later.")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_client_that_goes_away(
    address: str, served: Served, monkeypatch: pytest.MonkeyPatch, stream: bool, when: str
) -> None:
    """Its answer is not generated to the end, whether it has begun or waits."""
    scored: list[int] = []
    seen, go = threading.Event(), threading.Event()
    tell = Generation._scored

    def slowly(generation: Generation) -> None:
        scored.append(1)
        if len(scored) == 3:
            seen.set()
            assert go.wait(60)
        tell(generation)

    monkeypatch.setattr(Generation, "_scored", slowly)
    held = Held(monkeypatch)
    if when == "after":
        held.go.set()
    parts = urlsplit(address)
    client = http.client.HTTPConnection(str(parts.hostname), parts.port)
    client.request("POST", CHAT, json.dumps(body(URL, stream=stream, max_tokens=500)))
    assert held.begun.acquire(timeout=60)
    if when == "after":
        assert seen.wait(60)
        if stream:
            assert client.getresponse().status == 200
    client.close()
    if client.sock is not None:
        client.sock.close()
    until(lambda: served.metrics.in_flight == 0)
    go.set()
    held.go.set()
    monkeypatch.undo()
    assert call(address, CHAT, body(URL)).status == 200  # comes after what has been left
    assert len(scored) == (0 if when == "before" else 3)


def half_sent(address: str) -> socket.socket:
    """A request of which six bytes have come."""
    parts = urlsplit(address)
    client = socket.create_connection((str(parts.hostname), parts.port or 0), timeout=60)
    client.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode())
    client.sendall(b'{"mess')
    return client


def test_a_request_that_does_not_come(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps nobody out, and is refused after a while."""
    monkeypatch.setattr(served, "limits", replace(served.limits, body_seconds=1.0, waiting=1))
    with running(Server(App(served))) as found, half_sent(found) as one, half_sent(found) as other:
        assert call(found, CHAT, body(URL)).status == 200
        other.close()
        text = one.makefile("rb").read().decode()
        assert text.startswith("HTTP/1.1 408")
        assert "did not come in 1 seconds" in text
        until(lambda: 'status="499"' in call(found, "/metrics").text)
        assert 'status="408"} 1' in call(found, "/metrics").text


def test_a_server_stops_without_what_has_not_come(served: Served) -> None:
    server = Server(App(served))
    with running(server) as found, half_sent(found) as client:
        server.handle_exit(15, None)
        text = client.makefile("rb").read().decode()
        assert text.startswith("HTTP/1.1 503")
        assert "The server is stopping" in text
        until(lambda: server.should_exit)
        assert not server.force_exit


def test_reading_a_request_does_not_keep_others_waiting(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go, read = threading.Event(), threading.Event(), ChatRequest.read

    def slowly(*given: Any) -> ChatRequest:
        reading.set()
        assert go.wait(60)
        return read(*given)

    monkeypatch.setattr(ChatRequest, "read", slowly)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(call, address, CHAT, body(URL))
        assert reading.wait(60)
        assert call(address, "/health").status == 200
        go.set()
        assert asked.result().status == 200


def test_nothing_is_prepared_for_a_client_that_is_gone(
    address: str, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another request is made tokens, one waits for its turn and leaves."""
    began, go, asked = threading.Event(), threading.Event(), []
    prepare = Served.prepare

    def slowly(one: Served, given: ChatRequest, images: Any) -> Generation:
        asked.append(given)
        began.set()
        assert go.wait(60)
        return prepare(one, given, images)

    monkeypatch.setattr(Served, "prepare", slowly)
    parts = urlsplit(address)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(call, address, CHAT, body(URL))
        assert began.wait(60)
        leaving = http.client.HTTPConnection(str(parts.hostname), parts.port)
        leaving.request("POST", CHAT, json.dumps(body(URL)))
        until(lambda: served.metrics.in_flight == 2)
        leaving.close()
        until(lambda: served.metrics.in_flight == 1)
        go.set()
        assert first.result().status == 200
    assert call(address, CHAT, body(URL)).status == 200
    assert len(asked) == 2


def test_images_from_elsewhere(served: Served, tmp_path: Any) -> None:
    IMAGE.save(tmp_path / "one.png")
    with running(Server(App(served, Sources(folder=tmp_path)))) as found:
        reply = call(found, CHAT, body(f"file://{tmp_path}/one.png"))
        assert reply.answer == expected(served, fastv(4))
        assert call(found, CHAT, body("file:///etc/hostname")).status == 400


def test_stopping(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has begun is answered; what comes then is refused, until all is answered."""
    held = Held(monkeypatch)
    server = Server(App(served))
    with ThreadPoolExecutor(4) as threads, running(server) as found:
        begun = [threads.submit(call, found, CHAT, body(URL, stream=bool(i % 2))) for i in range(4)]
        until(lambda: served.metrics.in_flight == 4)
        server.handle_exit(15, None)
        reply = call(found, CHAT, body(URL))
        assert (reply.status, reply.reason) == (503, "The server is stopping; ask another one.")
        assert call(found, "/health").status == 503
        assert not any(each.done() for each in begun)
        held.go.set()
        assert [each.result().status for each in begun] == [200] * 4
        until(lambda: server.should_exit)
        assert not server.force_exit
    server.handle_exit(15, None)
    assert server.force_exit
