"""The page of an evaluation as people read it, in headless Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.browser import ARGUMENTS, BROWSER, contrast
from pore.bench.results import Spread
from pore.evaluation.differences import compare
from pore.evaluation.outcome import Answer, Outcome
from pore.evaluation.page import write_single
from pore.evaluation.results import About

pytest.importorskip("playwright.sync_api", reason="needs playwright: .ci/serve")

from playwright.sync_api import sync_playwright

if BROWSER is None:
    pytest.skip("there is no Chromium on this machine", allow_module_level=True)

RIGHT = {"FastV": 6, "Random": 9, "Downsample": 3}
"""Of twelve questions."""

COLUMN = "table.results tbody:nth-of-type(2) tr:not(.budget) > :nth-child({})"


def outcome(method: str | None, right: int) -> Outcome:
    answers = tuple(
        Answer(str(i), "q", "x", "x", i < right, "color", "top", ((0,),), 10**9) for i in range(12)
    )
    pruner: Any = method and SimpleNamespace(
        name=method, keep=4, layer=2, reweight=None, looks_at=[1], stages=list, resizes=False
    )
    if pruner:
        pruner.stages = lambda: [SimpleNamespace(layer=1)]
    return Outcome(pruner, answers, Spread((1000.0, 1100.0 + right, 1200.0)))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    unpruned, *others = [outcome(None, 12), *(outcome(*each) for each in RIGHT.items())]
    about = About("a <model>", "pore evaluate", "cal", "test", {"machine": "two & a half"})
    records = [one.record() for one in (unpruned, *others)]
    folder: Path = tmp_path_factory.mktemp("page")
    differences = [compare(unpruned, one) for one in others]
    return write_single(records, differences, about, folder).as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Any]:
    """Opens the page; at the end nothing was asked of anybody, and nothing went wrong."""
    contexts, asked, wrong = [], [], []

    def opened(**how: Any) -> Any:
        contexts.append(browser.new_context(**how))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    elsewhere = [url for url in asked if url != address and not url.startswith("data:")]
    assert (elsewhere, wrong) == ([], [])


def column(page: Any, number: int) -> list[str]:
    return [one.inner_text().split()[0] for one in page.query_selector_all(COLUMN.format(number))]


def test_tables_are_sorted_by_click(visit: Any) -> None:
    page = visit()
    head = page.get_by_role("columnheader", name="accuracy %")
    assert column(page, 1) == ["FastV", "Random", "Downsample"]
    for order, names in (
        ("descending", ["Random", "FastV", "Downsample"]),
        ("ascending", ["Downsample", "FastV", "Random"]),
        ("none", ["FastV", "Random", "Downsample"]),
    ):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == order
        assert column(page, 1) == names
    # The budget stays above its rows, and one column at a time says that it is sorted.
    page.get_by_role("columnheader", name="method").first.get_by_role("button").click()
    assert column(page, 1) == ["Downsample", "FastV", "Random"]
    assert page.locator("table.results tbody").nth(1).locator("tr").first.inner_text() == "keep 4"
    assert page.locator("table.results th[aria-sort=ascending]").count() == 1


def test_tables_are_sorted_by_keyboard(visit: Any) -> None:
    page = visit()
    head = page.get_by_role("columnheader", name="prefill ms")
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert column(page, 5) == ["1,109", "1,106", "1,103"]  # as numbers, not as text
    page.keyboard.press("Space")
    assert column(page, 5) == ["1,103", "1,106", "1,109"]


def test_it_reads_well_without_script(visit: Any) -> None:
    page = visit(java_script_enabled=False)
    assert page.locator("table.results button").count() == 0
    assert column(page, 1) == ["FastV", "Random", "Downsample"]
    assert page.locator(".dots .value").first.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(visit: Any, width: int, scheme: str) -> None:
    page = visit(viewport={"width": width, "height": 844}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for selector in ("body", ".lead", ".big", ".interval", ".dots .value", ".contents a", "small"):
        assert contrast(page, selector) > 4.5, selector
    for selector in (".dots .name", ".dots .value", "table.results td", ".note"):
        size = page.eval_on_selector(selector, "one => parseFloat(getComputedStyle(one).fontSize)")
        assert size >= 13, selector


def test_contents_lead_to_their_sections(visit: Any) -> None:
    page = visit()
    link = page.get_by_role("navigation", name="Contents").get_by_role("link", name="Every setting")
    link.click()
    assert page.url.endswith("#results")


def test_it_is_printed_as_by_day(visit: Any) -> None:
    """Ink on white paper, also where the screen is dark."""

    def colors(scheme: str, media: str) -> Any:
        page = visit(color_scheme=scheme)
        page.emulate_media(media=media)
        return page.evaluate(
            """() => {
              const style = getComputedStyle(document.documentElement);
              const names = ["ink", "soft", "line", "own", "accent", "dot", "paper", "card", "code",
                "right", "wrong"];
              return names.map(name => style.getPropertyValue("--" + name));
            }"""
        )

    assert colors("dark", "print") == colors("light", "print")
    assert colors("dark", "screen") != colors("light", "screen")
    assert all(colors("light", "screen"))
