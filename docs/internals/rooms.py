"""Draws rooms.svg: the rooms of the library and which imports from which, read from the code.

    python docs/internals/rooms.py           write it
    python docs/internals/rooms.py --check   exit with 1 where it is not what the code gives

Rows are the layers of the import linter's contract in pyproject.toml. An arrow is drawn where no
other way leads from the one room to the other.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PICTURE = HERE / "rooms.svg"
WIDTH, ROW, HEIGHT, GAP, SHIFT, LETTER = 960, 84, 36, 120, 110, 8.2


def layers() -> list[list[str]]:
    """The rooms by layer, from the top, as the contract in pyproject.toml names them."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'type = "layers".*?layers = \[(.*?)\]', text, re.DOTALL)
    assert found is not None
    return [re.findall(r"\w+", row) for row in re.findall(r'"(.*?)"', found[1])]


def imports(path: Path) -> Iterator[str]:
    """The rooms that a file imports from, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "pore":
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pore."):
            yield str(node.module).split(".")[1]


def arrows() -> dict[str, set[str]]:
    """The rooms that each room imports from, but for those that it reaches by another."""
    rooms = [room for layer in layers() for room in layer]
    source = ROOT / "src" / "pore"
    to: dict[str, set[str]] = {}
    for room in rooms:
        files = [source / f"{room}.py", *sorted((source / room).rglob("*.py"))]
        used = {name for file in files if file.exists() for name in imports(file)}
        to[room] = (used & set(rooms)) - {room}
    reached: dict[str, set[str]] = {}
    for room in reversed(rooms):  # those below first
        reached[room] = to[room].union(*(reached.get(below, set()) for below in to[room]))
    return {
        room: {below for below in to[room] if all(below not in reached[x] for x in to[room])}
        for room in rooms
    }


def picture() -> str:
    """The picture as SVG."""
    rows, at = layers(), {}
    boxes = []
    for number, row in enumerate(rows):
        widths = [len(room) * LETTER + 28 for room in row]
        x = (WIDTH - sum(widths) - GAP * (len(row) - 1)) / 2
        x += SHIFT * (-1) ** number  # so that arrows over several rows do not lie on each other
        for room, width in zip(row, widths, strict=True):
            y = 16 + number * ROW
            at[room] = (x + width / 2, y)
            boxes.append(
                f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{HEIGHT}" rx="6"/>'
                f'<text x="{x + width / 2:.0f}" y="{y + 23}">{room}</text>'
            )
            x += width + GAP
    lines = [
        f'<path d="M{at[one][0]:.0f} {at[one][1] + HEIGHT}L{at[other][0]:.0f} {at[other][1] - 5}"/>'
        for one, below in arrows().items()
        for other in sorted(below)
    ]
    height = 16 + len(rows) * ROW - (ROW - HEIGHT) + 16
    style = (
        "rect{fill:#eef4fb;stroke:#0072b2}text{font:14px monospace;text-anchor:middle;fill:#111}"
        "path{stroke:#777;fill:none;marker-end:url(#tip)}"
    )
    tip = (
        '<marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L6 3L0 6z" style="fill:#777;stroke:none"/></marker>'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}">',
            f"<style>{style}</style><defs>{tip}</defs>",
            '<rect width="100%" height="100%" style="fill:#fff;stroke:none"/>',
            *lines,
            *boxes,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(PICTURE.read_text(encoding="utf-8") != picture())
    PICTURE.write_text(picture(), encoding="utf-8")
