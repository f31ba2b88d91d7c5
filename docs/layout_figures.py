"""Draw which part of a picture every visual token shows, for every family, for layouts.md.

    python docs/layout_figures.py

Run it in a checkout: processors, models and pictures are those of the tests. Writes a sheet for
each of some pictures into `docs/images/layouts`, and the table of counts into `docs/layouts.md`.
Llama 4 is left out where torchvision is missing.
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from PIL import Image

from pore import plotting
from pore.data.coverage import coverage_of
from pore.data.prompts import render
from pore.errors import InputError
from pore.families.registry import family_of

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests"))

from helpers.photographs import SIZES, photograph  # noqa: E402
from processors import KINDS  # noqa: E402
from processors.base import Kind, parts  # noqa: E402

SHEETS = ("portrait", "panorama", "one pixel high", "4K")
ALIKE = ("Aya Vision", "LLaVA-NeXT-Video", "Qwen2-VL", "Qwen3.5", "GLM-4.6V", "Pixtral")
"""Drawn like others, so only counted."""
WIDTH, GAP = 1500, 12


def main() -> None:
    """Draw the sheets and count tokens."""
    kinds = []
    for kind in KINDS:
        try:
            parts(kind)
        except ImportError as error:
            print(f"{kind} is left out: {str(error).strip().splitlines()[0]}")
        else:
            kinds.append(kind)
    folder = DOCS / "images" / "layouts"
    folder.mkdir(parents=True, exist_ok=True)
    for name in SHEETS:
        drawn = [drawing(kind, name) for kind in kinds if kind.name not in ALIKE]
        sheet([one for one in drawn if one is not None]).save(
            folder / f"{name.lower().replace(' ', '-')}.png", optimize=True
        )
    page = DOCS / "layouts.md"
    text = page.read_text(encoding="utf-8")
    table = "\n".join(rows(kinds))
    text = re.sub(r"(?s)(<!-- counts -->\n).*(<!-- end -->)", rf"\1{table}\n\2", text)
    page.write_text(text, encoding="utf-8")


def drawing(kind: Kind, name: str) -> Image.Image | None:
    """The layout of a picture in a family, or None where its processor refuses it."""
    processor, model = parts(kind)
    picture = photograph(name)
    try:
        coverage = coverage_of(model, processor, picture, **kind.kwargs)
    except InputError:
        return None
    figure = plotting.layout(picture, coverage, title=kind.name)
    return Image.open(io.BytesIO(plotting.to_png(figure, dpi=64))).convert("RGB")


def sheet(drawings: list[Image.Image]) -> Image.Image:
    """Drawings in lines, as they fit."""
    lines: list[list[Image.Image]] = [[]]
    for one in drawings:
        if sum(other.width + GAP for other in lines[-1]) + one.width > WIDTH:
            lines.append([])
        lines[-1].append(one)
    height = sum(max(one.height for one in line) + GAP for line in lines)
    whole = Image.new("RGB", (WIDTH, height), "white")
    y = 0
    for line in lines:
        x = 0
        for one in line:
            whole.paste(one, (x, y))
            x += one.width + GAP
        y += max(one.height for one in line) + GAP
    return whole.quantize(96, dither=Image.Dither.NONE)


def rows(kinds: list[Kind]) -> list[str]:
    """The table of visual tokens by family and picture, structure after a plus."""
    names = list(SIZES)
    found = [f"| family | settings of | {' | '.join(names)} |", "|---|---|" + "---:|" * len(names)]
    found.append(f"| | pixels | {' | '.join('{} × {}'.format(*SIZES[n]) for n in names)} |")
    for kind in kinds:
        cells = [counts(kind, name) for name in names]
        found.append(f"| {kind.name} | {kind.checkpoint} | {' | '.join(cells)} |")
    return found


def counts(kind: Kind, name: str) -> str:
    """How many visual tokens and how much structure a picture comes to."""
    if name in kind.refuses:
        return "refused"
    processor, model = parts(kind)
    inputs = processor(
        images=[photograph(name)], text=[render(processor, "")], return_tensors="pt", **kind.kwargs
    )
    family = family_of(model)
    images = family.images(model, family.inputs(model, (), inputs))
    visual = " + ".join(str(len(image.columns)) for image in images)
    if len(images) > 2:
        visual = f"{len(images)} · {len(images[0].columns)}"
    structure = sum(len(image.structure) for image in images)
    return visual + (f" (+{structure})" if structure else "")


if __name__ == "__main__":
    main()
