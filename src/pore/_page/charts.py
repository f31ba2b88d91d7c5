"""Charts of a page: dots with intervals, made of the page's own elements.

Names and numbers in them are text, as large on a phone as elsewhere, in the page's own colours, and
read out where nobody sees the page. So they need no library and no script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pore._page.building import html, joined
from pore._text import Html


@dataclass(frozen=True)
class Dot:
    """A row of a chart.

    Attributes:
        name: What it is of.
        value: Where the dot is.
        shown: The value in words.
        ends: The ends of its interval, if it has one.
        more: What else is told where a pointer rests on the row.
        own: Whether it is the one to look at.
        hollow: Whether the dot is a ring: of a difference that may be chance.
    """

    name: str
    value: float
    shown: str
    ends: tuple[float, float] | None = None
    more: str = ""
    own: bool = False
    hollow: bool = False


def dots(
    groups: Sequence[tuple[str, Sequence[Dot]]],
    caption: str,
    *,
    line: float | None = None,
    within: tuple[float, float] | None = None,
) -> Html:
    """A chart: for every group its name, and a row for every dot.

    Args:
        groups: Names, which may be empty, and dots.
        caption: What is shown, and in which unit.
        line: Where a line is drawn to compare with.
        within: The ends of the scale; by default all that is shown, and a little more.

    Returns:
        The chart.
    """
    every = [dot for _, group in groups for dot in group]
    seen = [end for dot in every for end in (dot.value, *(dot.ends or ()))]
    seen += [] if line is None else [line]
    low, high = within or _room(min(seen), max(seen))
    scale = _Scale(low, high)
    ticks = joined(
        html("<i style='left:{}%'>{}</i>", scale.at(tick), _plain(tick)) for tick in scale.ticks()
    )
    rule = (
        Html("") if line is None else html("<i class='line' style='left:{}%'></i>", scale.at(line))
    )
    shown = joined(
        html(
            "{}<ul>{}</ul>",
            html("<p class='group'>{}</p>", name) if name else Html(""),
            joined(_row(dot, scale, rule) for dot in group),
        )
        for name, group in groups
    )
    return html(
        "<figure class='dots'><figcaption>{}</figcaption><div class='groups'>{}</div>"
        "<div class='scale' aria-hidden='true'><span>{}</span></div></figure>",
        caption,
        shown,
        ticks,
    )


def _row(dot: Dot, scale: _Scale, rule: Html) -> Html:
    interval = Html("")
    if dot.ends is not None:
        left, right = map(scale.at, dot.ends)
        interval = html(
            "<i class='ends' style='left:{}%;width:{}%'></i>", left, round(right - left, 2)
        )
    kind = "dot hollow" if dot.hollow else "dot"
    return html(
        "<li{} title='{}'><span class='name'>{}</span>"
        "<span class='track' aria-hidden='true'>{}{}<i class='{}' style='left:{}%'></i></span>"
        "<span class='value'>{}</span></li>",
        Html(" class='own'" if dot.own else ""),
        f"{dot.name}: {dot.shown}" + (f"; {dot.more}" if dot.more else ""),
        dot.name,
        rule,
        interval,
        kind,
        scale.at(dot.value),
        dot.shown,
    )


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float

    def at(self, value: float) -> float:
        """Where a value is, in percent of the width."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 2)

    def ticks(self) -> list[float]:
        """Round numbers along the scale, at most six."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [step * number for number in range(first, last + 1)]


def _room(low: float, high: float) -> tuple[float, float]:
    """The ends of a scale on which all is seen."""
    more = 0.04 * (high - low) or 1.0
    return low - more, high + more


def _plain(tick: float) -> str:
    return f"{tick:g}".replace("-", "−")
