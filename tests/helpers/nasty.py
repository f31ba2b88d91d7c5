"""Text that somebody may have written, and the parts that a terminal, page or figure obeys."""

from __future__ import annotations

from unicodedata import category

from hypothesis import strategies as st

NASTY = (
    "What costs $5 or $10?",
    "$x$",
    "$\\frac",
    "_^{}",
    "_",
    "100 % \\textbf{#}",
    "[red]",
    "[/]",
    "[bold]x[/bold] [link=http://x]",
    ":warning:",
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\x07\x08\x7f",
    "\x9b31m",
    "\u202egnp.exe\u202c",
    "\u2066\u200f\ufeff",
    "\x00",
    "two\nlines\r\u2028more",
    "=1+1",
    "+1",
    "-1",
    "@sum",
    "\t=1",
    "<script>alert(1)</script>",
    'a & b\'s "c"',
    "</th></table>",
    "{0} %s ${HOME} $model",
    "😀 你好 مرحبا \u0378",
    "half \ud83d of a character",
    "word " * 400,
    "x" * 3000,
)
ANY = st.text(st.characters(codec=None), max_size=40) | st.sampled_from(NASTY)
"""Any text at all."""


def obeyed(text: str) -> set[str]:
    """The characters of a text, except line ends, that are not shown but obeyed."""
    joiners = "\n\u200c\u200d"
    return {c for c in text if category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in joiners}
