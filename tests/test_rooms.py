"""The page about the rooms, and its picture, are of the code as it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
INTERNALS = ROOT / "docs" / "internals"
SOURCE = ROOT / "src" / "pore"


def rooms() -> set[str]:
    paths = [path for path in SOURCE.iterdir() if path.name not in ("__init__.py", "__pycache__")]
    return {path.stem for path in paths if path.suffix == ".py" or (path / "__init__.py").exists()}


def test_the_picture_is_of_the_code() -> None:
    drawn = subprocess.run([sys.executable, INTERNALS / "rooms.py", "--check"], check=False)
    assert drawn.returncode == 0, "run python docs/internals/rooms.py"
    names = set(re.findall(r"<text[^>]*>(\w+)<", (INTERNALS / "rooms.svg").read_text()))
    assert names == rooms()


def test_the_page_names_every_room_and_no_other() -> None:
    page = (INTERNALS / "README.md").read_text(encoding="utf-8")
    section = page.split("## The rooms, from the top")[1].split("\n## ")[0]
    named = re.findall(r"\*\*`(\w+)(?:/|\.py)`\*\*", section)
    assert sorted(named) == sorted(rooms())


def test_files_that_the_page_names_are_there() -> None:
    page = (INTERNALS / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", page):
        assert (SOURCE / name).exists() or (ROOT / name).exists(), name
