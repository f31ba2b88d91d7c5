"""Text of users on the terminal, by rich: without markup, and with control characters escaped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from pore._text import for_terminal, visible

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.style import Style


def cell(text: str, style: str = "") -> Text:
    """Text as a cell, heading or title of a table of rich.

    Args:
        text: Any text; of invisible characters only line ends stay.
        style: A style of rich.

    Returns:
        The text as rich shows it, without reading markup in it.
    """
    return Text(visible(text, "\n"), style)


class Screen(Console):
    """A console that shows every string as it is: no markup, no emoji codes, no controls.

    Styles are given by `style=` or by a `Text`.
    """

    def render_str(
        self,
        text: str,
        *,
        style: str | Style = "",
        justify: Any = None,
        overflow: Any = None,
        emoji: bool | None = None,
        markup: bool | None = None,
        highlight: bool | None = None,
        highlighter: Callable[[str | Text], Text] | None = None,
    ) -> Text:
        """A string as rich shows it; markup and highlighting are off whatever is asked for."""
        return Text(for_terminal(text), style, justify=justify, overflow=overflow)
