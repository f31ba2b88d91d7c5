"""Make the README's links addresses and name the project's, for the page of the package.

    python docs/package_page.py https://github.com/OWNER/NAME v0.1.0

A package index shows the README, but not what its relative links lead to. This writes README.md and
pyproject.toml anew, for a build of that tag; `git checkout README.md pyproject.toml` takes it back.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#:]+)(#[^()\s]*)?\)")


def addressed(text: str, repository: str, version: str) -> str:
    """A document of the repository's first folder with addresses in place of relative links.

    Args:
        text: The document, in Markdown.
        repository: The repository's address, such as https://github.com/OWNER/NAME.
        version: The tag or commit that the links lead to.
    """

    def link(found: re.Match[str]) -> str:
        image, label, path, part = found.groups(default="")
        kind = "raw" if image else "blob"
        return f"{image}[{label}]({repository}/{kind}/{version}/{path}{part})"

    return _LINK.sub(link, text)


def with_addresses(project: str, repository: str, version: str) -> str:
    """The text of pyproject.toml with the addresses of the project."""
    named = {
        "Repository": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/{version}/CHANGELOG.md",
    }
    lines = [f'{name} = "{address}"\n' for name, address in named.items()]
    before, head, after = project.partition("[project.optional-dependencies]\n")
    return f"{before}[project.urls]\n{''.join(lines)}\n{head}{after}"


def main(repository: str, version: str) -> None:
    """Write both files."""
    for name, made in (("README.md", addressed), ("pyproject.toml", with_addresses)):
        file = ROOT / name
        text = made(file.read_text(encoding="utf-8"), repository.rstrip("/"), version)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
