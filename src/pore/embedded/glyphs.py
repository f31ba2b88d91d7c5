"""The pictures that scenes are made of: shapes, letters, handwritten digits and textures."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from pore.embedded.splits import SPLITS, Split


@cache
def glyphs() -> dict[str, np.ndarray]:
    """All these pictures, from the file in the package."""
    return load_file(Path(__file__).with_name("glyphs.safetensors"))


@cache
def handwritten(split: Split, label: int) -> np.ndarray:
    """Indices of the handwritten samples of one digit in one split."""
    mine = glyphs()["digit_splits"] == SPLITS.index("test" if split == "fresh" else split)
    return np.flatnonzero(mine & (glyphs()["digit_labels"] == label))
