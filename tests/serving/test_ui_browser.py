"""The page of `pore ui` as people use it, in headless Chromium, on the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.browser import ARGUMENTS, BROWSER, contrast
from helpers.serving import running, until
from pore.cli.ui import EXAMPLES, Options, _app
from pore.data.sources import load_samples

pytest.importorskip("starlette", reason="needs the extra ui: .ci/serve runs this")
pytest.importorskip("uvicorn", reason="needs the extra ui: .ci/serve runs this")
pytest.importorskip("playwright.sync_api", reason="needs playwright: .ci/serve")

from playwright.sync_api import sync_playwright

from pore.serving.running import Server

if BROWSER is None:
    pytest.skip("there is no Chromium on this machine", allow_module_level=True)

WAIT = 60_000  # ms


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(Server(_app(Options(device="cpu")))) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield opened
        opened.close()


class Visitor:
    """A window of one's own on the page."""

    def __init__(self, browser: Any, address: str, **how: Any) -> None:
        self.address = address
        self.asked: list[str] = []
        self.wrong: list[str] = []
        self._context = browser.new_context(**how)
        self.page = self._context.new_page()
        self.page.set_default_timeout(WAIT)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.goto(address)

    def __enter__(self) -> Visitor:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()
        elsewhere = [url for url in self.asked if not url.startswith((self.address, "data:"))]
        assert (elsewhere, self.wrong) == ([], [])

    def until(self, expression: str) -> None:
        """Wait until something is so; the page forbids what playwright has for this."""
        until(lambda: self.page.evaluate(expression))

    def begin(self) -> None:
        self.page.click("#go")

    def said(self) -> str:
        """What is said at the end of a question."""
        self.until("document.getElementById('seen').ariaBusy !== 'true'")
        return str(self.page.inner_text("#status"))

    def ask(self) -> str:
        self.begin()
        return self.said()

    def answers(self) -> dict[str, str]:
        """The answers, by the titles that they stand under."""
        return {
            side.query_selector("h3").inner_text(): side.query_selector(".answer").inner_text()
            for side in self.page.query_selector_all("article")
        }


def test_the_examples_show_what_is_said_of_them(address: str, browser: Any) -> None:
    """FastV is wrong and PoRe right, the other way round, both wrong, both right."""
    scenes = list(load_samples("embedded:test", limit=max(EXAMPLES) + 1))
    wanted = {
        "FastV errs at a quarter of the tokens, and FastV + P does not.": (True, False, True),
        "Here P does harm: FastV is right without it.": (True, True, False),
        "At a quarter of the tokens, FastV errs with P and without.": (True, False, False),
        "At a quarter of the tokens, FastV is right with P and without.": (True, True, True),
    }
    with Visitor(browser, address) as visitor:
        buttons = visitor.page.query_selector_all("#examples button")
        for i, button in zip(EXAMPLES, buttons, strict=True):
            button.click()
            assert visitor.page.input_value("#question") == scenes[i].question
            hint = visitor.page.inner_text("#hint")
            assert hint == EXAMPLES[i]
            visitor.ask()
            answers = visitor.answers()
            assert list(answers) == ["Unpruned", "FastV", "FastV + P"]
            assert tuple(said == scenes[i].answer for said in answers.values()) == wanted[hint]


def test_upload_ask_and_switch_the_method(address: str, browser: Any, tmp_path: Path) -> None:
    scene = next(iter(load_samples("embedded:test", limit=1)))
    scene.load_image().resize((300, 200)).save(tmp_path / "scene.jpg")
    with Visitor(browser, address) as visitor:
        page = visitor.page
        page.set_input_files("#file", tmp_path / "scene.jpg")
        visitor.until("document.getElementById('picture').naturalWidth === 300")
        page.fill("#question", scene.question)
        assert page.inner_text("#hint") == ""
        page.fill("#keep", "72")
        assert visitor.ask().startswith(f"Unpruned: {scene.answer}. FastV: ")
        assert page.query_selector_all("dd")[4].inner_text() == "72 of 144"
        assert len(page.query_selector_all(".layers span")) == 8
        page.select_option("#method", "DivPrune")
        assert f"DivPrune: {visitor.answers().get('DivPrune', '')}" in visitor.ask()
        assert list(visitor.answers()) == ["Unpruned", "DivPrune"]
        notes = page.inner_text(".notes")
        assert "DivPrune has nothing to divide by P: shown without." in notes
        assert "DivPrune does not rank by text-visual attention" in notes
        page.select_option("#method", "FastV")
        page.fill("#layer", "3")  # P is measured there
        visitor.ask()
        assert list(visitor.answers()) == ["Unpruned", "FastV", "FastV + P"]


def test_a_picture_that_browsers_do_not_show(address: str, browser: Any, tmp_path: Path) -> None:
    scene = next(iter(load_samples("embedded:test", limit=1)))
    scene.load_image().save(tmp_path / "scene.tiff")
    with Visitor(browser, address) as visitor:
        visitor.page.set_input_files("#file", tmp_path / "scene.tiff")
        visitor.until("document.getElementById('picture').hidden")
        assert "does not show scene.tiff" in visitor.page.inner_text("#hint")
        visitor.page.fill("#question", scene.question)
        assert visitor.ask().startswith(f"Unpruned: {scene.answer}. FastV: ")
        visitor.page.query_selector("#examples button").click()
        visitor.until("document.getElementById('picture').checkVisibility()")


def test_a_picture_is_dropped(address: str, browser: Any, tmp_path: Path) -> None:
    with Visitor(browser, address) as visitor:
        visitor.page.evaluate(
            """async () => {
              const canvas = new OffscreenCanvas(50, 40);
              canvas.getContext("2d").fillRect(0, 0, 9, 9);
              const given = new DataTransfer();
              given.items.add(new File([await canvas.convertToBlob()], "one.png"));
              const drop = new DragEvent("drop", { dataTransfer: given, bubbles: true });
              document.getElementById("drop").dispatchEvent(drop);
            }"""
        )
        visitor.until("document.getElementById('picture').naturalWidth === 50")
        assert visitor.ask().startswith("Unpruned: ")


def test_what_is_broken_is_said_and_the_page_lives_on(
    address: str, browser: Any, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with Visitor(browser, address) as visitor:
        page = visitor.page
        page.set_input_files("#file", tmp_path / "broken.png")
        assert "An image cannot be read: it is damaged" in visitor.ask()
        assert visitor.answers() == {}
        page.query_selector("#examples button").click()
        for field, value, reason in (
            ("#keep", "500", "asks for more visual tokens"),
            ("#keep", "lots", "Budget"),
            ("#layer", "99", "layer"),
        ):
            before = page.input_value(field)
            page.fill(field, value)
            assert reason in visitor.ask()
            assert page.get_attribute("#status", "class") == "refused"
            page.fill(field, before)
        page.select_option("#method", "PixelBudget")
        assert "Use Downsample" in visitor.ask()
        page.select_option("#method", "FastV")
        assert visitor.ask() == "Unpruned: 7. FastV: 0. FastV + P: 7"
        assert page.get_attribute("#status", "class") == ""


def test_two_at_once(address: str, browser: Any) -> None:
    with Visitor(browser, address) as one, Visitor(browser, address) as two:
        two.page.query_selector_all("#examples button")[3].click()
        two.page.select_option("#method", "Random")
        two.page.select_option("#correction", "none")
        two.page.fill("#keep", "10")
        one.begin()
        two.begin()
        assert one.said() == "Unpruned: 7. FastV: 0. FastV + P: 7"
        assert two.said().startswith("Unpruned: 3. Random: ")
        assert "10 of 144" in two.page.inner_text("#seen")
        assert "36 of 144" in one.page.inner_text("#seen")
        assert one.page.input_value("#method") == "FastV"


def test_the_keyboard_alone(address: str, browser: Any) -> None:
    with Visitor(browser, address) as visitor:
        page, keys = visitor.page, visitor.page.keyboard
        reached = []
        for _ in range(12):
            keys.press("Tab")
            reached.append(page.evaluate("document.activeElement.id"))
            if reached[-1] == "go":
                break
        fields = ["question", "method", "keep", "layer", "correction", "go"]
        assert reached == ["file", *([""] * 5), *fields]
        keys.press("Shift+Tab")  # to the correction
        for _ in range(4):
            keys.press("Shift+Tab")  # to the question
        assert page.evaluate("document.activeElement.id") == "question"
        keys.press("Shift+Tab")  # to the last example
        keys.press("Enter")
        assert page.input_value("#question") == "What color is the square?"
        for _ in range(2):
            keys.press("Tab")
        keys.type("Ran")  # chooses by its first letters
        for _ in range(3):
            keys.press("Tab")
        keys.type("none")
        keys.press("Tab")
        keys.press("Enter")
        assert visitor.said().startswith("Unpruned: orange. Random: ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(address: str, browser: Any, scheme: str) -> None:
    """Nothing is wider than the window, and text can be told from what is behind it."""
    how = {"viewport": {"width": 390, "height": 844}, "color_scheme": scheme}
    with Visitor(browser, address, **how) as visitor:
        page = visitor.page
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        visitor.ask()
        top = page.evaluate("document.getElementById('seen').getBoundingClientRect().top")
        assert 0 <= top < 100  # what was asked for is in sight
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        for selector in ("body", ".answer", "dt", "#keep", "#go", "figcaption", "code"):
            assert contrast(page, selector) > 4.5, selector
