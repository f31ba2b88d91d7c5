"""What every page keeps to, read from the page itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

_EMPTY = {"meta", "img", "br", "source", "input", "link"}

# What makes a browser fetch something.
_FETCHED = {"src", "srcset", "poster", "data", "action", "background"}


class Page(HTMLParser):
    """The tags of a page with their attributes, in order, each with the tags around it."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(content)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs), tuple(self._open)))
        if tag not in _EMPTY:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every tag of a name."""
        return [attributes for name, attributes, _ in self.tags if name == tag]


def checked_page(content: str, *, contents: bool = True) -> Page:
    """A page, once it is known to keep to the rules.

    Args:
        content: The page.
        contents: Whether it has a list of contents.

    Returns:
        What was read.
    """
    page = Page(content)
    (style,) = re.findall(r"<style>(.*?)</style>", content, re.DOTALL)
    assert not re.search(r"@import|url\(", style)
    for tag, attributes, _ in page.tags:
        for name in _FETCHED & attributes.keys():
            assert str(attributes[name]).startswith("data:image/"), (tag, name)
        assert tag not in ("link", "iframe", "object", "embed", "base")
        if tag == "script":
            assert attributes == {}
        if "href" in attributes:
            assert not re.match(r"[a-z]+:|//", str(attributes["href"]))
    assert all(image.get("alt") for image in page.all("img"))
    _headings(page)
    ids = [str(each["id"]) for _, each, _ in page.tags if "id" in each]
    assert len(ids) == len(set(ids))
    links = [str(link["href"]) for link in page.all("a")]
    inside = [link[1:] for link in links if link.startswith("#")]
    assert set(inside) <= set(ids)
    if contents:
        sections = [str(h["id"]) for h in page.all("h2") if "id" in h]
        assert sections
        assert [name for name in inside if name in sections][-len(sections) :] == sections
    _tables(page)
    return page


def _headings(page: Page) -> None:
    levels = [int(tag[1]) for tag, _, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def _tables(page: Page) -> None:
    scopes = ("col", "row", "colgroup", "rowgroup")
    assert all(head.get("scope") in scopes for head in page.all("th"))
    for tag, attributes, around in page.tags:
        if tag == "table" and "sortable" in str(attributes.get("class")):
            assert around[-1] == "div"
    boxes = [each for each in page.all("div") if each.get("class") == "wide"]
    assert all(box.get("tabindex") == "0" and box.get("aria-label") for box in boxes)
    sortable = [each for each in page.all("table") if "sortable" in str(each.get("class"))]
    assert len(boxes) == len(sortable)
