"""Look at the built site in Chromium, as `.ci/docs` does.

    python docs/look_at_site.py build/site [FOLDER_FOR_PICTURES]

Every page is opened at 1280 pixels in the dark scheme and at 390 in the light one, some in all four
ways: nothing may fail or come from another host, no picture may be missing, and the page may not be
wider than the window. Then the search is used. With a folder, pictures of some pages are written.
"""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

WINDOWS = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
PICTURED = ("", "methods/", "methods/fastv/", "families/", "faq/", "api/calibration/")
NO_INDEX = {"config": {"lang": ["en"], "separator": " ", "fields": {}}, "docs": []}
MISSING = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
LEFT = "net::ERR_ABORTED"
SCHEME = "document.body.dataset.mdColorScheme"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Say nothing: what the browser did not get is told by it."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which a folder is served."""
    server = _Server(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def look(browser: Any, address: str, pages: list[str], window: str, scheme: str) -> list[str]:
    """What is wrong with pages in one window and scheme."""
    wrong: list[str] = []
    context = browser.new_context(viewport=WINDOWS[window], color_scheme=scheme)
    tab = context.new_page()
    tab.on("pageerror", lambda error: wrong.append(f"{tab.url}: {error}"))
    tab.on(
        "requestfailed",
        lambda request: (
            None
            if request.failure == LEFT  # what was still on its way when the next page was opened
            else wrong.append(f"{tab.url}: no {request.url}, {request.failure}")
        ),
    )
    tab.on(
        "request",
        lambda request: (
            None
            if request.url.startswith((address, "data:", "blob:"))
            else wrong.append(f"{tab.url} asks another host: {request.url}")
        ),
    )
    # Every page would load the index of the search, which is tried below.
    tab.route("**/search_index.json", lambda route: route.fulfill(json=NO_INDEX))
    for name in pages:
        tab.goto(address + name, wait_until="load")
        where = f"{name or 'the first page'}, {window}, {scheme}"
        wrong += [f"{where}: no picture {src}" for src in tab.evaluate(MISSING)]
        if tab.evaluate(WIDER) > 0:
            wrong.append(f"{where}: {tab.evaluate(WIDER)} pixels wider than the window")
        if tab.evaluate(SCHEME) != {"dark": "slate", "light": "default"}[scheme]:
            wrong.append(f"{where}: the scheme is {tab.evaluate(SCHEME)}")
        if len(sys.argv) > 2 and name in PICTURED:
            file = f"{name.strip('/').replace('/', '-') or 'start'}-{window}-{scheme}.png"
            tab.screenshot(path=Path(sys.argv[2]) / file)
    context.close()
    return wrong


def search(browser: Any, address: str, words: str, page: str) -> list[str]:
    """What is wrong where words are searched, whose first result should be a page."""
    tab = browser.new_page()
    tab.goto(address)
    tab.fill(".md-search__input", words)
    first = tab.wait_for_selector(".md-search-result__link", timeout=30_000).get_attribute("href")
    tab.close()
    return [] if page in str(first) else [f"the first result for {words!r} is {first}, not {page}"]


def main(site: Path) -> int:
    """Look at a site; 1 if something is wrong."""
    files = sorted(site.rglob("index.html"))
    pages = [f"{path.parent.relative_to(site).as_posix()}/".removeprefix("./") for path in files]
    binary = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    some = [page for page in pages if page in PICTURED]
    ways = {("desktop", "light"): some, ("desktop", "dark"): pages}
    ways |= {("phone", "light"): pages, ("phone", "dark"): some}
    with served(site) as address, sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=binary, args=["--no-sandbox", "--disable-gpu"]
        )
        wrong = [
            fault
            for window in WINDOWS
            for scheme in ("light", "dark")
            for fault in look(browser, address, ways[window, scheme], window, scheme)
        ]
        wrong += search(browser, address, "PyramidDrop", "methods/pyramiddrop/")
        wrong += search(browser, address, "left padding", "")
        browser.close()
    print("\n".join(wrong) or f"{len(pages)} pages are well in every window and scheme")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
