"""Draw a picture at several pixel budgets, for methods.md.

    python docs/pixel_budget_figure.py

Run it in a checkout: processor, model and picture are those of the tests. Writes
`docs/images/methods/pixelbudget.png`.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

import pore
from pore import plotting
from pore.data.coverage import coverage_of
from pore.data.scaling import tokens_of

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "tests"))

from helpers.photographs import photograph  # noqa: E402
from processors import KINDS  # noqa: E402
from processors.base import parts  # noqa: E402

BUDGETS = (1.0, 256, 64, 16)


def main() -> None:
    """Draw it."""
    (kind,) = (kind for kind in KINDS if kind.name == "Qwen2-VL")
    processor, model = parts(kind)
    picture = photograph("photograph")
    drawings = []
    for keep in BUDGETS:
        smaller = pore.PixelBudget(keep).resizing(model, processor).picture
        assert smaller is not None
        small = smaller(picture)
        coverage = coverage_of(model, processor, small)
        count = tokens_of(model, processor, small.size)
        title = f"{small.width} × {small.height}: {count} tokens"
        figure = plotting.layout(small, coverage, title=title)
        drawn = Image.open(io.BytesIO(plotting.to_png(figure, dpi=64))).convert("RGB")
        drawings.append(drawn)
    heights, widths = ([getattr(one, side) for one in drawings] for side in ("height", "width"))
    row = Image.new("RGB", (sum(widths), max(heights)), "white")
    for i, one in enumerate(drawings):
        row.paste(one, (sum(widths[:i]), 0))
    row.save(DOCS / "images" / "methods" / "pixelbudget.png", optimize=True)


if __name__ == "__main__":
    main()
