"""The page of the package: where the links of the README lead when it is shown elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://example.org/owner/name"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))


def test_every_link_of_the_readme_leads_to_a_file_of_the_tag() -> None:
    import package_page

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    made = package_page.addressed(text, REPOSITORY, "v1")
    assert not re.findall(r"\]\((?!https?://|#)", made)
    own = re.findall(rf"(!?)\[[^\]]*\]\({REPOSITORY}/(\w+)/v1/([^)#]+)", made)
    assert len(own) > 40
    assert {kind for image, kind, _ in own if image} == {"raw"}
    assert {kind for image, kind, _ in own if not image} == {"blob"}
    assert all((ROOT / path).exists() for *_, path in own)
    # Nothing else has changed, and nothing is done twice.
    assert re.sub(rf"{REPOSITORY}/\w+/v1/", "", made) == text
    assert package_page.addressed(made, REPOSITORY, "v1") == made


def test_the_project_has_its_addresses() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    import package_page

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(package_page.with_addresses(text, REPOSITORY, "v1"))["project"]
    assert project["urls"]["Changelog"] == f"{REPOSITORY}/blob/v1/CHANGELOG.md"
    before = tomllib.loads(text)["project"]
    assert {name: value for name, value in project.items() if name != "urls"} == before
