"""The objects of a scene: what they are, and where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pore.embedded.glyphs import handwritten
from pore.embedded.splits import Split, generator

SIDE = 96
"""Width and height of a scene in pixels."""

BOX = 16
"""Width and height of the square that an object is drawn in."""

THIRDS = ("top", "middle", "bottom")

PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)

COLORS = {
    "red": (220, 40, 40),
    "orange": (245, 145, 25),
    "yellow": (240, 225, 60),
    "green": (45, 175, 65),
    "blue": (55, 95, 230),
    "purple": (165, 65, 205),
    "white": (238, 238, 238),
}

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring")

LETTERS = "ABCEFHKLMRTX"

DIGITS = "0123456789"

SIZES = (11, 12, 13, 14, 15, 16)
"""Heights of shapes and letters in pixels; a digit is as high as its box."""

_PLACE_MARGIN = 4

_TRIES = 200


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        category: ``"shape"``, ``"digit"`` or ``"letter"``.
        name: The shape's name, the digit or the letter.
        color: A key of `COLORS`.
        x: Column of the centre in pixels.
        y: Row of the centre in pixels.
        size: Height in pixels.
        sample: Index of the handwritten sample, for a digit; otherwise 0.
        tint: Numbers added to the colour's red, green and blue.
    """

    category: Literal["shape", "digit", "letter"]
    name: str
    color: str
    x: int
    y: int
    size: int
    sample: int
    tint: tuple[int, int, int]

    @property
    def noun(self) -> str:
        """``"circle"``, ``"digit 7"`` or ``"letter A"``."""
        return self.name if self.category == "shape" else f"{self.category} {self.name}"

    @property
    def phrase(self) -> str:
        """The noun with its colour: ``"red circle"``."""
        return f"{self.color} {self.noun}"

    @property
    def third(self) -> str:
        """Third of the image that holds the centre: ``"top"``, ``"middle"`` or ``"bottom"``."""
        return THIRDS[min(3 * self.y // SIDE, 2)]

    @property
    def place(self) -> str:
        """Cell of the 3 x 3 grid that holds the centre, such as ``"top left"``."""
        return PLACES[min(3 * self.y // SIDE, 2)][min(3 * self.x // SIDE, 2)]

    @property
    def clear_of_borders(self) -> bool:
        """Whether the centre is far enough from the borders between places to be certain."""
        borders = (SIDE // 3, 2 * SIDE // 3)
        return all(abs(c - b) >= _PLACE_MARGIN for c in (self.x, self.y) for b in borders)


def _skewed(rng: np.random.Generator, n: int) -> np.ndarray:
    """Probabilities of ``n`` choices, in half of the cases with one favourite."""
    weights: np.ndarray = np.ones(n)
    if rng.random() < 0.5:
        weights[rng.integers(n)] += n / 2
    weights /= weights.sum()
    return weights


def things_of(
    split: Split, index: int, objects: tuple[int, int] = (4, 10), purpose: int = 0
) -> tuple[Thing, ...]:
    """The objects of a scene, without drawing it.

    Args:
        split: Which seeds and which handwritten digits to draw from.
        index: Number of the scene within the split.
        objects: Fewest and most objects.
        purpose: Of `generator`: 0 for pictures, 6 for videos, whose objects are others.

    Returns:
        Objects at positions uniform over the image, not touching each other.
    """
    rng = generator(split, index, purpose)
    n = int(rng.integers(objects[0], objects[1] + 1))
    colors = rng.choice(len(COLORS), n, p=_skewed(rng, len(COLORS)))
    shapes = rng.choice(len(SHAPES), n, p=_skewed(rng, len(SHAPES)))
    categories = rng.choice(3, n, p=(0.5, 0.25, 0.25))
    names = tuple(COLORS)
    half = BOX // 2
    spots = rng.integers(half, SIDE - half + 1, (_TRIES, 2)).tolist()
    tints = rng.integers(-15, 16, (n, 3)).tolist()
    sizes = rng.integers(len(SIZES), size=n).tolist()
    picks = rng.random(n).tolist()
    things: list[Thing] = []
    for x, y in spots:
        if any(max(abs(x - t.x), abs(y - t.y)) < BOX + 1 for t in things):
            continue
        i = len(things)
        size, sample = SIZES[sizes[i]], 0
        if categories[i] == 0:
            category, name = "shape", SHAPES[shapes[i]]
        elif categories[i] == 1:
            label = int(picks[i] * 10)
            samples = handwritten(split, label)
            sample = int(samples[int((picks[i] * 10 - label) * len(samples))])
            category, name, size = "digit", DIGITS[label], BOX
        else:
            category, name = "letter", LETTERS[int(picks[i] * len(LETTERS))]
        color = names[colors[i]]
        things.append(Thing(category, name, color, x, y, size, sample, tuple(tints[i])))  # type: ignore[arg-type]
        if len(things) == n:
            break
    return tuple(things)
