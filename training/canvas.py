"""Scenes on pictures of any size, for the real language model: 12 x 12, 16 x 16, 24 x 24 patches.

A scene of the package is 96 pixels wide. Here a picture of `side` pixels is drawn in the same way,
with as many objects per area and objects of the same size, so that a patch shows the same whatever
the size of the picture: only the number of patches differs. With 96 pixels it is the package's own
scene of that split and index.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import numpy.typing as npt
from visual import things_asked

from pore.embedded.asking import KINDS, Question, candidates
from pore.embedded.drawing import draw, opacity
from pore.embedded.splits import Split, generator
from pore.embedded.things import BOX, SIDE, THIRDS, Thing, things_of

PATCH = 8
"""Width and height of a patch in pixels."""

COVERED = 8 * 255
"""How much of a patch an object must cover to be shown by it, in units of 1/255 pixel."""

_POSITIONS = 3
"""The `purpose` with which `generator` draws positions on a larger picture."""

Array = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Canvas:
    """A picture of some size with the objects on it.

    Attributes:
        side: Its width and height in pixels.
        image: ``(side, side, 3)``.
        things: The objects, their centres in pixels of this picture.
    """

    side: int
    image: Array
    things: tuple[Thing, ...]

    @property
    def grid(self) -> int:
        """Rows and columns of patches."""
        return self.side // PATCH

    def covers(self, thing: Thing) -> Flags:
        """``(N,)`` bool: the patches that show an object of this picture."""
        return self.coverage(thing) >= COVERED

    def coverage(self, thing: Thing) -> npt.NDArray[np.int32]:
        """``(N,)``: how much of every patch an object covers, in units of 1/255 pixel."""
        half = BOX // 2
        cover = np.zeros((self.side, self.side), np.int32)
        cover[thing.y - half : thing.y + half, thing.x - half : thing.x + half] = opacity(thing)
        total: npt.NDArray[np.int32] = cover.reshape(self.grid, PATCH, self.grid, PATCH).sum((1, 3))
        return total.reshape(-1)

    @property
    def scaled(self) -> tuple[Thing, ...]:
        """The objects where they would lie on a picture of 96 pixels, for words about places."""
        return tuple(
            replace(t, x=t.x * SIDE // self.side, y=t.y * SIDE // self.side) for t in self.things
        )


@dataclass(frozen=True)
class Asked:
    """A question about a picture.

    Attributes:
        index: Number of the picture within its split.
        canvas: The picture.
        question: What is asked.
        patches: ``(N,)`` bool: the patches that show an object which the question is about.
    """

    index: int
    canvas: Canvas
    question: Question
    patches: Flags


def canvas(split: Split, index: int, side: int) -> Canvas:
    """Picture `index` of a split at some size, always the same."""
    things = _things(split, index, side)
    return Canvas(side, draw(split, index, things, (side, side)), things)


def _things(split: Split, index: int, side: int) -> tuple[Thing, ...]:
    """The objects of as many scenes as the picture has room for, not touching each other."""
    scenes = round((side / SIDE) ** 2)
    if side == SIDE:
        return things_of(split, index)
    wanted = [t for i in range(scenes) for t in things_of(split, scenes * index + i)]
    rng = generator(split, index, _POSITIONS)
    placed: list[Thing] = []
    for x, y in rng.integers(BOX // 2, side - BOX // 2 + 1, (200 * scenes, 2)).tolist():
        if all(max(abs(x - t.x), abs(y - t.y)) >= BOX + 1 for t in placed):
            placed.append(replace(wanted[len(placed)], x=x, y=y))
            if len(placed) == len(wanted):
                break
    return tuple(placed)


def asked(split: Split, first: int, n: int, side: int) -> Iterator[Asked]:
    """`n` questions about objects that are present, each about its own picture.

    Kinds take turns, and within a kind the thirds of the image, as in the standard stream
    (`pore.embedded.scenes.questions`). Pictures for which the next question cannot be asked are
    skipped, and so are questions about absent objects, for which no patch is right.

    Args:
        split: Which seeds and which handwritten digits to draw from.
        first: Number of the first picture within the split.
        n: How many questions.
        side: Width and height of the pictures in pixels.
    """
    indices = count(first)
    for i in range(n):
        kind, turn = KINDS[i % len(KINDS)], i // len(KINDS)
        for index in indices:
            things = _things(split, index, side)
            blank = Canvas(side, np.zeros((side, side, 3), np.uint8), things)
            rng = generator(split, index, 2)
            due = [
                (question, named)
                for question in candidates(blank.scaled, rng)[kind]
                if (named := things_asked(question.question, things))
                and question.third in (None, THIRDS[turn % 3])
            ]
            if due:
                question, named = due[rng.integers(len(due))]
                shown = replace(blank, image=draw(split, index, things, (side, side)))
                yield Asked(index, shown, question, np.any([shown.covers(t) for t in named], 0))
                break
