"""Tables of a page: with header cells, scrolled sideways where they are wide, and sortable."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pore._page.building import html, joined
from pore._text import Html, for_html


class Row(NamedTuple):
    """The row of a table.

    Attributes:
        cells: The cells; the first names the row.
        own: Whether it is shaded, as the one to look at.
    """

    cells: Sequence[object]
    own: bool = False


def table(
    name: str,
    headings: Sequence[object],
    groups: Iterable[tuple[str, Iterable[Row]]],
    *,
    above: Sequence[tuple[str, int]] = (),
    kind: str = "results",
) -> Html:
    """A table in a box that scrolls sideways.

    Rows are sorted within their group, by a script that makes buttons of the headings: without it,
    a table is as it was written.

    Args:
        name: What the table shows, for people who do not see it.
        headings: One for every column.
        groups: For every group of rows its name, which may be empty, and the rows.
        above: Names that stand above several headings, each with how many; "" for none.
        kind: The class of the table, for its looks.

    Returns:
        The table.
    """
    width = len(headings)
    head = html("<tr>{}</tr>", _cells("<th scope='col'>{}</th>", headings))
    if any(title for title, _ in above):
        spans = joined(
            html("<th colspan='{}' scope='colgroup'>{}</th>", count, title)
            if title
            else html("<td colspan='{}'></td>", count)
            for title, count in above
        )
        head = html("<tr class='spans'>{}</tr>{}", spans, head)
    bodies = joined(_body(title, rows, width) for title, rows in groups)
    return html(
        "<div class='wide' role='region' aria-label='{}' tabindex='0'>"
        "<table class='sortable {}'><thead>{}</thead>{}</table></div>",
        name,
        kind,
        head,
        bodies,
    )


def _body(title: str, rows: Iterable[Row], width: int) -> Html:
    pattern = "<tr class='budget'><th colspan='{}' scope='rowgroup'>{}</th></tr>"
    named = html(pattern, width, title) if title else Html("")
    return html("<tbody>{}{}</tbody>", named, joined(map(_row, rows)))


def _row(row: Row) -> Html:
    first, *others = row.cells
    cells = html("<th scope='row'>{}</th>{}", first, _cells("<td>{}</td>", others))
    return html("<tr class='own'>{}</tr>" if row.own else "<tr>{}</tr>", cells)


def _cells(pattern: str, cells: Iterable[object]) -> Html:
    return Html("".join(html(pattern, for_html(cell)) for cell in cells))
