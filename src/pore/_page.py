"""Pages: a single HTML file that contains everything it shows, so that it opens offline."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from importlib import resources
from string import Template

from pore._text import Html, for_html


def filled(
    template: str, title: str, *, command: str, setup: Mapping[str, str], **values: object
) -> Html:
    """Fill a template and put it into the page; every value that is not `Html` is escaped.

    Args:
        template: The name of a file in `templates`.
        title: The title of the page.
        command: The command line that made it.
        setup: Hardware, versions and settings, in words by name.
        **values: The values for the template's places.

    Returns:
        The text of the page.
    """
    rows = (html("<tr><th>{}</th><td>{}</td></tr>", *each) for each in setup.items())
    return _substituted(
        "page.html",
        title=title,
        style=Html(_resource("style.css")),
        body=_substituted(template, **values),
        command=command,
        setup=joined(rows),
    )


def part(template: str, **values: object) -> Html:
    """A filled template without a page around it, as a value for another template."""
    return _substituted(template, **values)


def html(pattern: str, *values: object) -> Html:
    """HTML with text in its braces, escaped unless it is `Html`."""
    return Html(pattern.format(*map(for_html, values)))


def joined(parts: Iterable[Html]) -> Html:
    """Parts of a page, one after another."""
    return Html("\n".join(parts))


def items(texts: Iterable[str]) -> Html:
    """The items of a list."""
    return joined(html("<li>{}</li>", text) for text in texts)


def row(cells: Iterable[object], tag: str = "td", own: bool = False) -> Html:
    """The row of a table, shaded if it is the user's own."""
    inner = Html("".join(html(f"<{tag}>{{}}</{tag}>", cell) for cell in cells))
    return html("<tr class='own'>{}</tr>" if own else "<tr>{}</tr>", inner)


def picture(png: bytes) -> str:
    """The address of a picture that is in the page itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _resource(name: str) -> str:
    return resources.files("pore").joinpath(f"templates/{name}").read_text(encoding="utf-8")


def _substituted(template: str, **values: object) -> Html:
    shown = {name: for_html(value) for name, value in values.items()}
    return Html(Template(_resource(template)).substitute(shown))
