"""Procedural scenes with visual question answering, for the embedded model.

A scene is a 96 x 96 picture of four to ten small objects (coloured shapes, handwritten digits,
printed letters) on a textured background, with questions that have one right answer each: colour,
shape, existence, place, count, relation and reading, in the manner of CLEVR, POPE and TextVQA.

Scenes are a function of ``(split, index)``. The splits draw from disjoint seeds, and the
handwritten digits are split by sample, so that no digit sample of the tests was seen in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

from pore.embedded.asking import KINDS, Question, candidates, caption, choose, is_due
from pore.embedded.drawing import Image, draw
from pore.embedded.splits import Split, generator
from pore.embedded.things import SIDE, Thing, things_of

SIZES = ((96, 96), (144, 96), (96, 144), (144, 144), (192, 96), (128, 192))
"""Width and height in pixels of scenes of mixed sizes."""


@dataclass(frozen=True)
class Scene:
    """A picture with its objects and questions.

    Attributes:
        image: ``(height, width, 3)`` array of uint8: 96 x 96 pixels, or one of `SIZES`.
        questions: Up to two questions of each kind, shuffled.
        caption: All objects in reading order.
        things: The objects, where they lie on 96 x 96 pixels.
    """

    image: Image
    questions: tuple[Question, ...]
    caption: str
    things: tuple[Thing, ...]


def scene(split: Split, index: int, objects: tuple[int, int] = (4, 10), each: int = 2) -> Scene:
    """Scene ``index`` of a split, always the same.

    Args:
        split: One of `SPLITS`.
        index: Number of the scene within the split.
        objects: Fewest and most objects.
        each: How many questions of each kind, at most.
    """
    things = things_of(split, index, objects)
    asked = choose(things, generator(split, index, 2), each)
    return Scene(draw(split, index, things), asked, caption(things), things)


def questions(split: Split, n: int, *, mixed: bool = False) -> Iterator[tuple[Scene, Question]]:
    """The standard evaluation stream: ``n`` questions, each about its own scene.

    Kinds take turns. Within a kind the thirds of the image take turns, as do yes and no, the
    counts from 0 to 4 and the nine places; scenes in which the next question cannot be asked are
    skipped.

    With `mixed`, every scene has one of `SIZES`: the same objects of the same size in a larger
    picture, further apart, so that all answers stay right.
    """
    indices = count()
    for i in range(n):
        kind, turn = KINDS[i % len(KINDS)], i // len(KINDS)
        for index in indices:
            things = things_of(split, index)
            rng = generator(split, index, 2)
            due = [q for q in candidates(things, rng)[kind] if is_due(q, turn)]
            if due:
                question = due[rng.integers(len(due))]
                size = _size(split, index) if mixed else (SIDE, SIDE)
                image = draw(split, index, _spread(things, size), size)
                yield Scene(image, (question,), caption(things), things), question
                break


def _size(split: Split, index: int) -> tuple[int, int]:
    """The size of a scene among scenes of mixed sizes."""
    return SIZES[generator(split, index, 4).integers(len(SIZES))]


def _spread(things: tuple[Thing, ...], size: tuple[int, int]) -> tuple[Thing, ...]:
    """The objects at the same relative places of a picture of some width and height."""
    width, height = size
    return tuple(replace(t, x=t.x * width // SIDE, y=t.y * height // SIDE) for t in things)
