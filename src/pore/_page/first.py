"""The first screen of a page: a number, a pair of pictures, a chart, and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from pore._page.building import File, html, items, joined, part
from pore._text import Html

_TALL = 11
"""A chart of so many rows is tall: what was found stands beside it, not below."""


@dataclass(frozen=True)
class First:
    """What stands first on a page.

    Attributes:
        heading: The title.
        lead: What the page is about, in a sentence or two.
        number: The one number.
        unit: Its unit, such as "points"; may be empty.
        interval: Its interval, or why there is none.
        about: What it is of.
        chart: A chart, such as of `charts.dots`.
        found: What was found, in sentences, also what does not flatter.
        note: How to read them.
        pair: Two pictures side by side, where there are two that show the point.
        files: The files beside the page.
    """

    heading: str
    lead: str
    number: str
    unit: str
    interval: str
    about: str
    chart: Html
    found: Sequence[str]
    note: str | Html = ""
    pair: Html = Html("")  # noqa: RUF009
    files: Sequence[File] = ()

    def shown(self) -> Html:
        """The first screen as HTML."""
        links = joined(
            html("<li><a href='{}'>{}</a> {}</li>", quote(one.path), one.path, one.said)
            for one in self.files
        )
        short = self.chart.count("<li") < _TALL
        return part(
            "first.html",
            heading=self.heading,
            lead=self.lead,
            number=self.number,
            unit=self.unit,
            interval=self.interval,
            about=self.about,
            pair=self.pair,
            chart=self.chart,
            kind=f"screen{' with-pair' if self.pair else ''}{' short' if short else ''}",
            found=items(self.found),
            note=html("<p class='note'>{}</p>", self.note) if self.note else Html(""),
            files=html("<ul class='files' aria-label='Files beside this page'>{}</ul>", links)
            if self.files
            else Html(""),
        )
