"""Render the parts of the scenes once, into ``src/pore/embedded/glyphs.safetensors``.

Handwritten digits are the UCI set that scikit-learn ships (8x8, enlarged to 16x16), split by sample
into train, calibration and test; letters come from Pillow's own font; shapes and background
textures are drawn here. At run time the scenes need only numpy and this file.

    python training/make_glyphs.py
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring")
LETTERS = "ABCEFHKLMRTX"
SIZES = (11, 12, 13, 14, 15, 16)
BOX = 16
OVERSAMPLING = 8
OUT = Path(__file__).parents[1] / "src" / "pore" / "embedded" / "glyphs.safetensors"


def polygon(name: str) -> list[tuple[float, float]]:
    """Corners of a shape in the unit square."""
    if name == "square":
        return [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)]
    if name == "triangle":
        return [(0.5, 0.0), (1.0, 0.95), (0.0, 0.95)]
    if name == "diamond":
        return [(0.5, 0.0), (0.95, 0.5), (0.5, 1.0), (0.05, 0.5)]
    if name == "cross":
        a, b = 0.34, 0.66
        return [
            (a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b),
            (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a),
        ]  # fmt: skip
    if name == "star":
        return [
            (
                0.5 + r * math.sin(math.pi * k / 5),
                0.53 - r * math.cos(math.pi * k / 5),
            )
            for k, r in enumerate([0.53, 0.21] * 5)
        ]
    raise ValueError(name)


def into_box(mask: Image.Image, size: int) -> np.ndarray:
    """Reduce an oversampled mask to ``size`` pixels, centred in a ``BOX`` x ``BOX`` array."""
    small = np.asarray(mask.resize((size, size), Image.Resampling.BOX))
    box = np.zeros((BOX, BOX), np.uint8)
    start = (BOX - size) // 2
    box[start : start + size, start : start + size] = small
    return box


def draw_shape(name: str, size: int) -> np.ndarray:
    """One filled shape as a ``(16, 16)`` mask."""
    n = size * OVERSAMPLING
    mask = Image.new("L", (n, n))
    draw = ImageDraw.Draw(mask)
    if name in ("circle", "ring"):
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
        if name == "ring":
            w = 0.24 * n
            draw.ellipse((w, w, n - 1 - w, n - 1 - w), fill=0)
    else:
        draw.polygon([(x * (n - 1), y * (n - 1)) for x, y in polygon(name)], fill=255)
    return into_box(mask, size)


def draw_letter(letter: str, size: int) -> np.ndarray:
    """One capital letter whose height is ``size`` pixels, as a ``(16, 16)`` mask."""
    n = size * OVERSAMPLING
    font = ImageFont.load_default(n * 1.35)
    left, top, right, bottom = font.getbbox(letter, stroke_width=OVERSAMPLING // 2)
    mask = Image.new("L", (n, n))
    origin = ((n - right - left) / 2, (n - bottom - top) / 2)
    ImageDraw.Draw(mask).text(
        origin, letter, fill=255, font=font, stroke_width=OVERSAMPLING // 2, stroke_fill=255
    )
    return into_box(mask, size)


def textures(count: int, side: int) -> np.ndarray:
    """Grey background textures: smooth clouds of several scales plus fine grain."""
    rng = np.random.default_rng(7)
    out = []
    for _ in range(count):
        total = rng.normal(0, 0.5, (side, side))
        for cells in (5, 10, 20):
            cloud = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
            total += np.asarray(cloud.resize((side, side), Image.Resampling.BICUBIC))
        total = (total - total.min()) / (total.max() - total.min())
        out.append((255 * total).astype(np.uint8))
    return np.stack(out)


def main() -> None:
    """Write the glyph file."""
    digits = load_digits()
    handwritten = np.stack(
        [
            np.asarray(
                Image.fromarray((d * 15.9).astype(np.uint8)).resize(
                    (BOX, BOX), Image.Resampling.BILINEAR
                )
            )
            for d in digits.images
        ]
    )
    strengthened = np.clip(handwritten.astype(np.int32) * 5 // 4, 0, 255).astype(np.uint8)
    split = np.random.default_rng(0).permutation(
        np.repeat(np.arange(3, dtype=np.uint8), (1197, 200, 400))
    )
    save_file(
        {
            "shapes": np.stack([[draw_shape(s, n) for n in SIZES] for s in SHAPES]),
            "letters": np.stack([[draw_letter(c, n) for n in SIZES] for c in LETTERS]),
            "digits": strengthened,
            "digit_labels": digits.target.astype(np.uint8),
            "digit_splits": split,
            "textures": textures(6, 192),
        },
        OUT,
        metadata={
            "digits": "UCI Optical Recognition of Handwritten Digits, CC BY 4.0, by scikit-learn",
            "letters": "Aileron (CC0), as shipped with Pillow",
        },
    )


if __name__ == "__main__":
    main()
