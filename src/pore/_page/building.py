"""How a page is put together from templates; text that is not HTML already is escaped."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from string import Template
from typing import NamedTuple

from pore._text import Html, for_html

# A section's heading. No text of a user can be one, because its brackets are escaped.
_HEADING = re.compile(r"""<h2 id=["']([a-z0-9-]+)["']>(.*?)</h2>""", re.DOTALL)


class File(NamedTuple):
    """A file that lies beside a page.

    Attributes:
        path: Its path from the page's folder.
        said: What it holds.
    """

    path: str
    said: str


def filled(
    template: str,
    title: str,
    *,
    command: str,
    setup: Mapping[str, str],
    first: Html = Html(""),  # noqa: B008
    sortable: bool = True,
    **values: object,
) -> Html:
    """Fill a template and put it into the page; every value that is not `Html` is escaped.

    Args:
        template: The name of a file in `templates`.
        title: The title of the page.
        command: The command line that made it.
        setup: Hardware, versions and settings, in words by name.
        first: The first screen, as of `First.shown`. A page that has one gets a list of contents.
        sortable: Whether the page gets the script that sorts tables.
        **values: The values for the template's places.

    Returns:
        The text of the page.
    """
    rows = (html("<tr><th scope='row'>{}</th><td>{}</td></tr>", *each) for each in setup.items())
    details = _substituted(
        "details.html", body=_substituted(template, **values), command=command, setup=joined(rows)
    )
    script = html("<script>\n{}</script>", Html(_resource("report.js"))) if sortable else Html("")
    return _substituted(
        "page.html",
        title=title,
        style=Html(_resource("style.css")),
        first=first,
        contents=_contents(details) if first else Html(""),
        kind="report" if first else "plain",
        details=details,
        script=script,
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


def address(image: bytes) -> str:
    """The address of a picture that is in the page itself: a PNG or a JPEG."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(image).decode("ascii")


def picture(image: bytes, alt: str, caption: str | Html = "", narrow: bytes | None = None) -> Html:
    """A figure with a picture that is in the page itself.

    Args:
        image: The picture.
        alt: What it shows, in words.
        caption: What is written below it.
        narrow: The same drawn for a phone, where there is one.
    """
    shown = html("<img src='{}' alt='{}'>", address(image), alt)
    if narrow is not None:
        source = "<source media='(max-width: 40rem)' srcset='{}'>"
        shown = html(f"<picture>{source}{{}}</picture>", address(narrow), shown)
    below = html("<figcaption>{}</figcaption>", caption) if caption else Html("")
    return html("<figure>{}{}</figure>", shown, below)


def _contents(details: Html) -> Html:
    """A list of the sections, each with a link."""
    found: Sequence[tuple[str, str]] = _HEADING.findall(details)
    lines = (html("<li><a href='#{}'>{}</a></li>", name, Html(title)) for name, title in found)
    return html(
        "<nav class='contents' aria-label='Contents'><p>Contents</p><ol>{}</ol></nav>",
        joined(lines),
    )


def _resource(name: str) -> str:
    return resources.files("pore").joinpath(f"templates/{name}").read_text(encoding="utf-8")


def _substituted(template: str, **values: object) -> Html:
    shown = {name: for_html(value) for name, value in values.items()}
    return Html(Template(_resource(template)).substitute(shown))
