"""Hooks of MkDocs: pages of the site from outside `docs/`.

Links in the documents are relative paths, as a repository browser follows them. Here whatever they
lead to becomes part of the site: README.md is its first page, other Markdown files are pages,
Python files are pages that show their code, and other files are copied.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
FIRST = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")

_CODE = re.compile(r"^( *)(`{3,}).*?^\1\2 *$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()([^()\s#:]+)(?=[#)])")


def site_path(path: Path) -> str:
    """Where in the site a file of the repository lies, as if everything lay in `docs/`."""
    name = path.relative_to(ROOT).as_posix()
    if name == "README.md":
        return "index.md"
    name = name.removeprefix("docs/")
    return f"{name.removesuffix('.py')}.md" if name.endswith(".py") else name


def linked(text: str, origin: Path) -> dict[str, Path]:
    """The targets of a document's links, and the files that they lead to."""
    targets = {found[1] for found in _LINK.finditer(_CODE.sub("", text))}
    paths = {one: Path(os.path.normpath(origin.parent / unquote(one))) for one in targets}
    return {one: path for one, path in paths.items() if path.is_file() and ROOT in path.parents}


def relinked(text: str, origin: Path) -> str:
    """A document with the links that it has in the site."""
    paths, here = linked(text, origin), Path(site_path(origin)).parent

    def target(found: re.Match[str]) -> str:
        path = paths.get(found[1])
        return found[1] if path is None else quote(os.path.relpath(site_path(path), here))

    code, end, parts = list(_CODE.finditer(text)), 0, []
    for block in code:
        parts += [_LINK.sub(target, text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, _LINK.sub(target, text[end:])])


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what lies outside `docs/`: the first pages, and everything that a page leads to."""
    pages = [Path(file.abs_src_path) for file in files.documentation_pages()]
    todo = [*pages, *(ROOT / name for name in FIRST)]
    known = {Path(file.abs_src_path) for file in files if not file.src_uri.endswith(".py")}
    while todo:
        path = todo.pop()
        text = path.read_text(encoding="utf-8")
        if path not in known:
            files.append(_page(path, text, config))
            known.add(path)
        if path.suffix != ".md":
            continue
        for target in linked(text, path).values():
            if target.suffix in (".md", ".py"):
                todo += [target] if target not in known and target not in todo else []
            elif target not in known:
                known.add(target)
                files.append(File.generated(config, site_path(target), abs_src_path=str(target)))
    return files


def _page(path: Path, text: str, config: MkDocsConfig) -> File:
    """The page for a file outside the site's folder, or for a Python file."""
    if path.suffix == ".py":
        text = f"# {path.name}\n\n```python\n{text.rstrip()}\n```\n"
    file = File.generated(config, site_path(path), content=text)
    file.pore_origin = path  # type: ignore[attr-defined]
    return file


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Make the links of a page lead within the site."""
    origin = getattr(page.file, "pore_origin", None) or Path(str(page.file.abs_src_path))
    if origin.suffix != ".md":
        return markdown
    # Errors are no language of Pygments; the class lets their long lines wrap.
    return relinked(markdown, origin).replace("```error\n", "``` {.text .error}\n")
