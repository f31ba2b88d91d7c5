"""The page of `pore ui` over HTTP."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

import pore
from helpers.calibrations import make_processor
from helpers.models import tiny_llava
from helpers.serving import call, data_url, encoded, picture, running, traces, until
from pore.serving.looking import Looking, Viewer
from pore.serving.requests import Limits
from pore.serving.served import Gone, Served

pytest.importorskip("starlette", reason="needs the extra ui: .ci/serve runs this")
pytest.importorskip("uvicorn", reason="needs the extra ui: .ci/serve runs this")

from pore.serving.page import Example, PageApp
from pore.serving.running import Server

P = pore.PositionBias.fit(torch.linspace(1, 3, 16).exp(), kind="empirical")
FORM: dict[str, Any] = {
    "image": data_url(picture()),
    "question": "w6 w20",
    "method": "FastV",
    "keep": "25%",
    "layer": "",
    "correction": "P",
}
NASTY = "<script>alert(1)</script>"


class Read(HTMLParser):
    """What an answer shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += [data.strip()] if data.strip() else []

    def found(self, attribute: str) -> list[str]:
        return [str(attrs[attribute]) for _, attrs in self.tags if attribute in attrs]


@pytest.fixture(scope="module")
def app() -> PageApp:
    model = tiny_llava(layers=4, dtype=torch.float32).eval()
    limits = Limits(body_bytes=100_000, pixels=10_000, waiting=4, new_tokens=5)
    served = Served("tiny", model, make_processor(do_center_crop=False), limits=limits)
    served.try_out()
    viewer = Viewer(served, {"P": [P]}, ["without-rope"])
    return PageApp(viewer, NASTY, [Example(picture(), "w6", NASTY)], NASTY, {"machine": NASTY})


@pytest.fixture(scope="module")
def address(app: PageApp) -> Iterator[str]:
    with running(Server(app)) as found:
        yield found


def test_the_page_asks_nobody_else(address: str) -> None:
    page = call(address, "/")
    shown = Read(page.text)
    named = [*shown.found("src"), *shown.found("href")]
    assert {url for url in named if not url.startswith("data:image/")} == {"ui.css", "ui.js"}
    for route, kind in (("/", "text/html"), ("/ui.css", "text/css"), ("/ui.js", "text/javascript")):
        reply = call(address, route)
        assert reply.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert "://" not in reply.text
    assert NASTY not in page.text
    assert shown.words.count(NASTY) == 3  # hint, command and setup


def test_an_answer(address: str, app: PageApp) -> None:
    clean = traces(app.served.model)
    reply = call(address, "/ask", FORM)
    assert reply.status == 200
    assert traces(app.served.model) == clean
    shown = Read(reply.text)
    titles = [word for word in shown.words if word in ("Unpruned", "FastV", "FastV + P")]
    assert titles == ["Unpruned", "FastV", "FastV + P"]
    assert shown.words.count("4 of 16") == 2
    pictures = shown.found("src")
    assert len(pictures) == 4  # three sides and the attention
    assert all(url.startswith("data:image/png;base64,") for url in pictures)
    said = shown.found("aria-label")[0]
    assert "FastV + P: " in said
    assert "Unpruned: " in said
    heights = shown.found("style")
    assert len(heights) == 2 * 4


def test_markup_of_visitors_stays_text(address: str) -> None:
    reply = call(address, "/ask", FORM | {"method": NASTY})
    assert reply.status == 400
    assert NASTY in reply.reason  # as text, which the page shows as text
    assert NASTY not in call(address, "/ask", FORM | {"question": NASTY}).text


@pytest.mark.parametrize(
    ("given", "status", "reason"),
    [
        ({"image": "data:image/png;base64,AAAA"}, 400, "An image cannot be read: it is damaged"),
        ({"image": data_url(picture())[:-400] + "===="}, 400, "An image"),
        ({"image": data_url(picture(200, 200))}, 413, "send smaller images"),
        ({"image": "data:"}, 400, "data:image/...;base64"),
        ({"image": "file:///etc/passwd"}, 400, "The picture must come with the question"),
        ({"image": "http://127.0.0.1/a.png"}, 400, "The picture must come with the question"),
        ({"question": "w6 " * 30_000}, 400, "more than 65536 characters"),
        ({"image": ""}, 400, "There is no picture"),
        ({"keep": "17"}, 400, "asks for more visual tokens"),
        ({"keep": "200%"}, 400, "is not a fraction in (0, 1]"),
        ({"method": "DivPrune", "layer": "2"}, 400, "DivPrune has no layer K to choose"),
        ({"layer": "9"}, 400, "layer"),
    ],
)
def test_refusals_are_in_words_and_the_page_lives_on(
    address: str, given: dict[str, str], status: int, reason: str
) -> None:
    reply = call(address, "/ask", FORM | given)
    assert reply.status == status
    assert reason in reply.reason
    assert "--" not in reply.reason  # the page has no options of a command line
    assert call(address, "/ask", FORM).status == 200


def test_a_large_picture_is_refused_before_it_is_decoded(address: str) -> None:
    from PIL import Image

    large = data_url(Image.new("RGB", (200, 200), "white"))
    assert len(encoded(Image.new("RGB", (200, 200), "white"))) < 100_000
    reply = call(address, "/ask", FORM | {"image": large})
    assert (reply.status, "pixels" in reply.reason) == (400, True)


def test_visitors_do_not_see_each_other(address: str) -> None:
    """Many at once, each with a picture and settings of their own, see what each sees alone."""
    images = [data_url(picture(seed=seed)) for seed in range(4)]
    choices = [(keep, method) for keep in ("2", "50%") for method in ("FastV", "DivPrune")]
    settings = [
        {"keep": keep, "method": method, "correction": "none", "image": image}
        for image, (keep, method) in zip(images, choices, strict=True)
    ]
    drawn = ("src", "style")

    def seen(given: dict[str, str]) -> Any:
        reply = call(address, "/ask", FORM | given)
        assert reply.status == 200
        shown = Read(reply.text)
        times = [word for word in shown.words if word.endswith(" ms")]
        assert len(times) == 4
        words = [word for word in shown.words if word not in times]
        return words, *(shown.found(name) for name in drawn)

    alone = [seen(given) for given in settings]
    with ThreadPoolExecutor(4) as visitors:
        for _ in range(2):
            assert list(visitors.map(seen, settings)) == alone
    assert len({str(each) for each in alone}) == len(settings)


def test_a_visitor_who_goes_is_not_answered(
    address: str, app: PageApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    come, go, gone = threading.Event(), threading.Event(), threading.Event()
    see = Looking.see

    def held(looking: Looking) -> Any:
        come.set()
        assert go.wait(60)
        try:
            return see(looking)
        except Gone:
            gone.set()
            raise

    monkeypatch.setattr(Looking, "see", held)
    connection = http.client.HTTPConnection(urlsplit(address).netloc)
    connection.request("POST", "/ask", json.dumps(FORM))
    assert come.wait(60)
    connection.close()
    until(lambda: app.served.metrics.in_flight == 0)
    go.set()
    assert gone.wait(60)
    assert call(address, "/ask", FORM).status == 200


def test_too_many_are_turned_away(
    address: str, app: PageApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    see = Looking.see

    def held(looking: Looking) -> Any:
        assert go.wait(60)
        return see(looking)

    monkeypatch.setattr(Looking, "see", held)
    with ThreadPoolExecutor(4) as visitors:
        waiting = [visitors.submit(call, address, "/ask", FORM) for _ in range(4)]
        until(lambda: app.served.metrics.in_flight == 4)
        reply = call(address, "/ask", FORM)
        assert (reply.status, "4 requests wait already" in reply.reason) == (503, True)
        assert call(address, "/").status == 200
        go.set()
        assert [each.result().status for each in waiting] == [200] * 4
