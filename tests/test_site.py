"""The pages of the documentation site say what the code says; `.ci/docs` builds and looks at it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import pore
from pore.families.registry import families
from pore.methods.registry import built_in, methods

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
HEADINGS = ["Cost", "When to use it", "Settings", "Traps"]


def page_of(name: str) -> Path:
    return DOCS / "methods" / f"{name.lower().replace('+', '-plus').replace(' ', '-')}.md"


def names() -> list[str]:
    return [kind.name for kind in built_in().values()]


@pytest.mark.slow
def test_pages_have_what_the_registry_says() -> None:
    command = [sys.executable, DOCS / "method_pages.py", "--check"]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, f"run python docs/method_pages.py: {out.stderr}"


def test_every_method_has_a_page_and_no_other_has() -> None:
    assert {page_of(name) for name in names()} == set((DOCS / "methods").glob("*.md"))


@pytest.mark.parametrize("name", names())
def test_a_page_of_a_method(name: str) -> None:
    page = page_of(name).read_text(encoding="utf-8")
    assert page.startswith(f"# {name}\n\n")
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == HEADINGS
    what = page.split("\n\n")[1]
    assert 2 <= len(re.findall(r"[.:](?=\s|$)", what)) <= 4, what
    picture = DOCS / "images" / "methods" / f"{name.lower().replace(' ', '-')}.png"
    assert picture.exists() == (f"![What {name} keeps](../images/methods/" in page)


def test_a_picture_is_missing_only_where_a_method_needs_more_than_a_model() -> None:
    pictured = {path.stem for path in (DOCS / "images" / "methods").glob("*.png")}
    without = {name for name in names() if name.lower() not in pictured}
    assert without == {"D2Pruner", "SGL", "Scored", "VisionTrim"}


def test_families_have_a_row_each() -> None:
    page = (DOCS / "families.md").read_text(encoding="utf-8").split("<!-- end of families")[0]
    for model_type, family in families().items():
        if not type(family).__module__.startswith("pore."):
            continue
        (row,) = re.findall(rf"^\| {re.escape(family.name)} \| .*$", page, re.MULTILINE)
        assert f"`{model_type}`" in row


def test_the_reference_has_every_public_name_once() -> None:
    pages = [path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md")]
    shown = Counter(found for page in pages for found in re.findall(r"^::: (\S+)$", page, re.M))
    assert max(shown.values()) == 1
    public = {f"pore.{name}" for name in pore._HOME} | {f"pore.{name}" for name in built_in()}
    assert public <= set(shown)
    outside = {kind.__name__ for kind in methods().values()} - set(built_in())
    assert not {f"pore.{name}" for name in outside} & set(shown)


def test_every_document_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    listed = set(re.findall(r"(\S+\.md)$", nav, re.MULTILINE))
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} <= listed


def test_links_lead_to_where_files_lie_in_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs", reason="needs the group docs: .ci/docs builds the site")
    monkeypatch.syspath_prepend(str(DOCS))
    import site_hooks

    text = "[a](docs/faq.md#x) `[b](docs/faq.md)` [c](examples/chat.py) [d](https://x.org/a.md)\n"
    assert site_hooks.relinked(text, ROOT / "README.md") == (
        "[a](faq.md#x) `[b](docs/faq.md)` [c](examples/chat.md) [d](https://x.org/a.md)\n"
    )
    page = DOCS / "methods" / "fastv.md"
    assert site_hooks.relinked("[a](../../README.md#speed)", page) == "[a](../index.md#speed)"
    fence = "```\n[a](docs/faq.md)\n```\n"
    assert site_hooks.relinked(fence, ROOT / "README.md") == fence


def said(node: ast.AST) -> str | None:
    """A text of the code, with … for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        return re.sub("…+", "…", "".join(map(str, parts)))
    return None


def test_errors_of_the_faq_are_those_that_are_raised() -> None:
    page = (DOCS / "faq.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^```error\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL)
    assert len(quoted) > 30
    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "src" / "pore").rglob("*.py")]
    texts = {(said(node) or "").strip() for tree in trees for node in ast.walk(tree)}
    stale = [text for text in quoted if text not in texts]
    assert not stale, "no error says so any more; mend docs/faq.md:\n" + "\n".join(stale)
