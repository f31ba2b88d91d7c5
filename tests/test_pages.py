"""What pages are built from: charts, tables and the first screen."""

from __future__ import annotations

import re

import pytest

from helpers.pages import checked_page
from pore._page import Dot, File, First, dots, filled, html, table
from pore._page.tables import Row


def lefts(content: str, kind: str) -> list[float]:
    return [float(x) for x in re.findall(rf"<i class='{kind}' style='left:([\d.]+)%", content)]


def test_dots_lie_where_their_values_are() -> None:
    rows = [Dot("a", 0.0, "0"), Dot("b", 25.0, "25", (0.0, 100.0)), Dot("c", 100.0, "100")]
    shown = dots([("one", rows)], "caption", line=50.0, within=(0.0, 100.0))
    assert lefts(shown, "dot") == [0.0, 25.0, 100.0]
    assert lefts(shown, "line") == [50.0] * 3
    assert "left:0.0%;width:100.0%" in shown
    assert re.findall(r"%'>([\d−.]+)</i>", shown) == ["0", "20", "40", "60", "80", "100"]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [((0.0, 1.0), 6), ((-3.0, 12.0), 4), ((5.0,), 5), ((1e-6, 3e-6), 5), ((-2e7, 9e7), 6)],
)
def test_all_of_a_chart_is_on_its_scale(values: tuple[float, ...], ticks: int) -> None:
    shown = dots([("", [Dot("x", value, "") for value in values])], "caption")
    assert all(0 < left < 100 for left in lefts(shown, "dot"))
    marked = re.findall(r"<i style='left:([\d.]+)%'>", shown)
    assert 2 <= len(marked) <= 6
    assert all(0 <= float(one) <= 100 for one in marked)
    assert ticks >= len(marked) - 1


def test_a_row_says_more_to_a_pointer_and_is_read_out() -> None:
    shown = dots([("", [Dot("a<b", 1.0, "1.0", more="36 tokens", own=True, hollow=True)])], "c")
    assert "<li class='own' title='a&lt;b: 1.0; 36 tokens'>" in shown
    assert "class='dot hollow'" in shown
    assert shown.count("aria-hidden='true'") == 2  # the track and the scale; names and values stay


def test_a_page_has_what_its_first_screen_says() -> None:
    first = First(
        *("A <title>", "lead", "+1.2", "points", "[0.1, 2.3]", "of what", html("<p>chart</p>")),
        found=["one & two", "three"],
        note="note",
        files=[File("a b&.csv", "the table")],
    )
    rows = table("Some", ("name", "value"), [("keep 4", [Row(("<x>", 1)), Row(("y", 2), True)])])
    text = filled(
        "sweep.html",
        "A <title>",
        command="a & b",
        setup={"<machine>": "it"},
        first=first.shown(),
        table=rows,
        changes="",
        groups="",
        left_out="",
    )
    page = checked_page(text)
    assert page.all("nav")[0] == {"class": "contents", "aria-label": "Contents"}
    links = [link["href"] for link in page.all("a")]
    assert links == ["a%20b%26.csv", "#results", "#changes", "#groups", "#left-out", "#run"]
    for shown in ("A <title>", "one & two", "<machine>", "<x>", "a b&.csv"):
        assert shown in page.text
    assert [each.get("scope") for each in page.all("th")] == [
        *("col", "col", "rowgroup", "row", "row", "row"),
    ]
