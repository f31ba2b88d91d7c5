"""Text of users made safe, and that nothing shows text in another way."""

from __future__ import annotations

import ast
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.text import Text as RichText

import pore
from helpers.nasty import ANY, obeyed
from pore._screen import Screen, cell
from pore._text import (
    Html,
    capitalised,
    for_csv,
    for_figure,
    for_html,
    for_latex,
    for_terminal,
    visible,
)

SOURCE = Path(pore.__file__).parent


# -- the room itself ------------------------------------------------------------------------------


@given(ANY)
def test_what_is_shown_is_obeyed_by_nothing(text: str) -> None:
    for shown in (visible(text), for_figure(text), for_csv(text)):
        assert not obeyed(shown)
        assert "\n" not in shown
        shown.encode()  # no half of a character is left
    assert not obeyed(for_terminal(text)) - {"\t"}
    assert for_terminal(text).count("\n") == text.count("\n")


@given(st.text(st.characters(categories=["L", "N", "P", "S", "M"]) | st.just(" ")))
def test_what_can_be_seen_stays(text: str) -> None:
    assert visible(text) == for_terminal(text) == text


def test_what_is_obeyed_is_spelled_out() -> None:
    assert visible("a\x1b[31m\u202e\ud800\n") == "a\\x1b[31m\\u202e\\ud800\\n"
    assert visible("👩\u200d🚀") == "👩\u200d🚀"


@given(ANY, st.integers(10, 60), st.integers(1, 4))
def test_text_of_a_figure_has_its_room(text: str, width: int, lines: int) -> None:
    shown = for_figure(text, width, lines).split("\n")
    assert len(shown) <= lines
    assert max(map(len, shown)) <= width + 1
    whole = visible(" ".join(text.split()))
    kept = "".join(shown).replace(" ", "")
    assert whole.replace(" ", "").startswith(kept.removesuffix("…"))
    if not kept.endswith("…"):
        assert kept == whole.replace(" ", "")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@x", "'@x"),
        ("\t=1", "\\t=1"),
        (" =1", "' =1"),
        ("＝1", "'＝1"),
        ("kind.=1", "kind.=1"),
        ("a-b", "a-b"),
        (-1.5, -1.5),
        (None, None),
    ],
)
def test_no_cell_begins_a_formula(text: Any, shown: Any) -> None:
    assert for_csv(text) == shown


@given(ANY)
def test_latex_obeys_nothing(text: str) -> None:
    shown = for_latex(text)
    assert not obeyed(shown)
    rest = re.sub(r"\\(text[a-z]+\{\}|[&%$#_{}])", "", shown)
    assert not set(rest) & set("\\&%$#_{}~^<>")


def test_latex_of_a_name() -> None:
    assert for_latex("llava_gqa 50 % {x}^") == r"llava\_gqa 50 \% \{x\}\textasciicircum{}"


@given(ANY)
def test_pages_show_text_as_text(text: str) -> None:
    data = io.StringIO()
    parser = HTMLParser()
    parser.handle_data = data.write  # type: ignore[assignment,method-assign]
    parser.handle_starttag = lambda *_: pytest.fail("a tag")  # type: ignore[method-assign]
    parser.feed(for_html(text))
    parser.close()
    assert data.getvalue() == visible(text, "\n\t")
    attribute: dict[str, str | None] = {}
    parser = HTMLParser()
    parser.handle_starttag = lambda _, pairs: attribute.update(pairs)  # type: ignore[method-assign]
    parser.feed(f"<img alt='{for_html(text)}'>")
    assert attribute == {"alt": visible(text, "\n\t")}
    assert for_html(Html("<b>")) == "<b>"


@given(ANY)
@example("[red]x[/red] [/] :warning: 3.14 'text'")
@example("\u2e80\tfull-width characters take two columns, which a tab counts")
def test_a_screen_shows_strings_as_they_are(text: str) -> None:
    shown = RichText(for_terminal(text))
    shown.expand_tabs(8)
    for terminal in (False, True):
        screen = Screen(file=io.StringIO(), width=200, force_terminal=terminal, color_system=None)
        screen.print(text, soft_wrap=True)
        assert screen.file.getvalue() == shown.plain + "\n"  # type: ignore[attr-defined]


def test_a_capital_leaves_names_as_they_are() -> None:
    assert capitalised("only PoRe gets right") == "Only PoRe gets right"
    assert capitalised("") == ""


# -- nothing goes around --------------------------------------------------------------------------


def calls(path: Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize(
    "path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.relative_to(SOURCE).as_posix()
)
def test_no_module_has_a_console_markup_or_html_of_its_own(path: Path) -> None:
    if path.name in ("_text.py", "_screen.py"):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = {name.name for name in node.names}
            assert node.module not in ("rich.markup", "html"), "text goes through pore._text"
            assert not (node.module == "rich.console" and "Console" in names), (
                "use pore._screen.Screen"
            )
            assert not (node.module == "rich" and "print" in names), "use pore._screen.Screen"
            if (node.module or "").startswith("matplotlib"):
                assert path.parent.name == "plotting", "figures are drawn in the style of plotting"
    for call in calls(path):
        name = ast.unparse(call.func)
        assert name != "print", "use pore._screen.Screen"
        assert not name.endswith(("from_markup", "from_ansi")), "text is no markup"
        assert not name.endswith(".capitalize"), "use pore._text.capitalised, which leaves names"
        if name == "typer.echo":  # as JSON, which has no controls, or what we wrote ourselves
            wrote = ("json.dumps(", "for_terminal(", "f'pore {__version__")
            assert not call.args or ast.unparse(call.args[0]).startswith(wrote)
        if name.endswith("TextColumn") and "task." in ast.unparse(call.args[0]):
            markup = {word.arg: ast.unparse(word.value) for word in call.keywords}["markup"]
            assert markup == "False", "text is no markup"


def test_cells_are_texts_of_rich() -> None:
    assert cell("[red]\x1b").plain == "[red]\\x1b"
