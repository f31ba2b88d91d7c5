"""Text of users made safe for where it is shown: terminals, figures, pages and CSV files.

Questions, answers, ids, kinds and the names of files and models can hold anything. All of them go
through here before they are shown, so that dollars start no formula, brackets no markup, and a
control character is spelled out instead of being obeyed.
"""

from __future__ import annotations

import textwrap
from html import escape
from typing import Any
from unicodedata import category

# Controls, invisible formatting such as a change of direction, halves of a character, separators.
_OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}

# Between letters of some scripts, and between the parts of an emoji.
_JOINERS = "\u200c\u200d"

# What begins a formula in a spreadsheet, in half and in full width.
_FORMULAS = "=+-@＝＋－＠"

_LONGEST_NAME = 60


def visible(text: str, spare: str = "") -> str:
    r"""Text with invisible characters spelled out: the escape character becomes `\x1b`.

    These are the characters that a terminal or a page obeys, such as controls and changes of
    direction.

    Args:
        text: Any text, also with halves of surrogate pairs, as Python has them for file names that
            are not UTF-8.
        spare: Characters to leave as they are.

    Returns:
        Text that can be encoded and that changes nothing around it.
    """
    return "".join(
        c
        if c.isprintable() or c in spare or c in _JOINERS or category(c) not in _OBEYED
        else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def capitalised(text: str) -> str:
    """Text with a capital at its beginning, and names inside it as they are: "Only PoRe is right".

    `str.capitalize` would write "Only pore is right".
    """
    return text[:1].upper() + text[1:]


def for_terminal(text: str) -> str:
    """Text for a terminal, with its line ends and tabs.

    Args:
        text: Any text.

    Returns:
        The text with everything else that a terminal obeys spelled out.
    """
    return visible(text, "\n\t")


def for_figure(text: str, width: int = _LONGEST_NAME, lines: int = 1) -> str:
    """Text for a figure, wrapped and cut to the room there is.

    Dollars stay: the style that `pore.plotting` draws in has formulas switched off.

    Args:
        text: Any text; line ends and runs of blanks become one blank.
        width: The most characters in a line.
        lines: The most lines.

    Returns:
        The text, with an ellipsis where it was cut.
    """
    shown = visible(" ".join(text.split()))
    # Text that does not fit is cut before wrapping, because wrapping a megabyte takes long.
    wrapped = textwrap.wrap(shown[: 2 * width * (lines + 1)], width)
    if len(wrapped) > lines:
        wrapped[lines - 1 :] = [f"{wrapped[lines - 1][: width - 1]}…"]
    found = "\n".join(wrapped)
    # matplotlib omits labels that begin with an underscore from legends.
    return f" {found}" if found.startswith("_") else found


def for_csv(value: Any) -> Any:
    """A value as a cell or heading of a CSV file that no spreadsheet mistakes for a formula.

    Args:
        value: Text, or anything else, which stays as it is.

    Returns:
        Text in one line, with an apostrophe before it if it would begin a formula.
    """
    if not isinstance(value, str):
        return value
    shown = visible(value)
    return f"'{shown}" if shown.lstrip().startswith(tuple(_FORMULAS)) else shown


# What LaTeX obeys, and how it is written instead.
_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def for_latex(text: str) -> str:
    """Text for a LaTeX document, in one line, that starts no command and no formula.

    Args:
        text: Any text.

    Returns:
        The text with everything that LaTeX obeys spelled out.
    """
    return "".join(_LATEX.get(sign, sign) for sign in visible(text))


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def for_html(value: object) -> Html:
    """Text for a page, in an element or an attribute.

    Args:
        value: Text; `Html` stays as it is, and anything else becomes text by `str`.

    Returns:
        Its HTML.
    """
    return value if isinstance(value, Html) else Html(escape(visible(str(value), "\n\t")))
