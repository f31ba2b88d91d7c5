"""Procedural scenes with visual question answering, for the embedded model.

A scene is a 96 x 96 picture of four to ten small objects (coloured shapes, handwritten digits,
printed letters) on a textured background, with questions that have one right answer each: colour,
shape, existence, place, count, relation and reading, in the manner of CLEVR, POPE and TextVQA.

Scenes are a function of ``(split, index)``. The splits draw from disjoint seeds, and the
handwritten digits are split by sample, so that no digit of the test was seen in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import load_file

Split = Literal["train", "calibration", "test"]


Image = np.ndarray


SIDE = 96


"""Width and height of a scene in pixels."""


SPLITS: tuple[Split, ...] = ("train", "calibration", "test")


KINDS = ("color", "shape", "existence", "place", "count", "relation", "reading")


THIRDS = ("top", "middle", "bottom")


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


REGIONS = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)


MAX_COUNT = 4


"""Largest answer to a question of how many."""


DIRECTIONS = {
    "above": (0, -1),
    "below": (0, 1),
    "left of": (-1, 0),
    "right of": (1, 0),
}


_SIZES = (11, 12, 13, 14, 15, 16)


_BOX = 16


_REGION_MARGIN = 4


_RELATION_MARGIN = 14


_TRIES = 200


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        family: ``"shape"``, ``"digit"`` or ``"letter"``.
        name: The shape's name, the digit or the letter.
        color: A key of `COLORS`.
        x: Column of the centre in pixels.
        y: Row of the centre in pixels.
        size: Height in pixels.
        sample: Index of the handwritten sample, for a digit; otherwise 0.
        tint: What is added to the colour's red, green and blue.
    """

    family: Literal["shape", "digit", "letter"]
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
        return self.name if self.family == "shape" else f"{self.family} {self.name}"

    @property
    def phrase(self) -> str:
        """The noun with its colour: ``"red circle"``."""
        return f"{self.color} {self.noun}"

    @property
    def third(self) -> str:
        """Third of the image that holds the centre: ``"top"``, ``"middle"`` or ``"bottom"``."""
        return THIRDS[min(3 * self.y // SIDE, 2)]

    @property
    def region(self) -> str:
        """Cell of the 3 x 3 grid that holds the centre, such as ``"top left"``."""
        return REGIONS[min(3 * self.y // SIDE, 2)][min(3 * self.x // SIDE, 2)]

    @property
    def inside_region(self) -> bool:
        """Whether the centre is clear of the borders between regions."""
        borders = (SIDE // 3, 2 * SIDE // 3)
        return all(abs(c - b) >= _REGION_MARGIN for c in (self.x, self.y) for b in borders)


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        question: The text, such as ``"What color is the circle?"``.
        answer: The one right answer, such as ``"red"``.
        kind: One of `KINDS`.
        third: Third of the image of the object asked for (``"top"``, ``"middle"``, ``"bottom"``),
            or None where no single object is.
    """

    question: str
    answer: str
    kind: str
    third: str | None = None


@dataclass(frozen=True)
class Scene:
    """A picture with its objects and questions.

    Attributes:
        image: ``(96, 96, 3)`` array of uint8.
        questions: Up to two questions of each kind, shuffled.
        caption: All objects in reading order.
        things: The objects.
    """

    image: Image
    questions: tuple[Question, ...]
    caption: str
    things: tuple[Thing, ...]


@cache
def _glyphs() -> dict[str, np.ndarray]:
    path = Path(__file__).with_name("glyphs.safetensors")
    return load_file(path)


@cache
def _handwritten(split: Split, label: int) -> Image:
    """Indices of the handwritten samples of one digit in one split."""
    glyphs = _glyphs()
    mine = glyphs["digit_splits"] == SPLITS.index(split)
    return np.flatnonzero(mine & (glyphs["digit_labels"] == label))


def _generator(split: Split, index: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([SPLITS.index(split), index, purpose])


def _skewed(rng: np.random.Generator, n: int) -> np.ndarray:
    """Probabilities over ``n`` choices, in half of the cases with one favourite."""
    weights: np.ndarray = np.ones(n)
    if rng.random() < 0.5:
        weights[rng.integers(n)] += n / 2
    weights /= weights.sum()
    return weights


def layout(split: Split, index: int, objects: tuple[int, int] = (4, 10)) -> tuple[Thing, ...]:
    """The objects of a scene, without drawing it.

    Args:
        split: Which seeds and which handwritten digits to draw from.
        index: Number of the scene within the split.
        objects: Fewest and most objects.

    Returns:
        Objects at positions uniform over the image, not touching each other.
    """
    rng = _generator(split, index, 0)
    n = int(rng.integers(objects[0], objects[1] + 1))
    colors = rng.choice(len(COLORS), n, p=_skewed(rng, len(COLORS)))
    shapes = rng.choice(len(SHAPES), n, p=_skewed(rng, len(SHAPES)))
    families = rng.choice(3, n, p=(0.5, 0.25, 0.25))
    names = tuple(COLORS)
    half = _BOX // 2
    spots = rng.integers(half, SIDE - half + 1, (_TRIES, 2)).tolist()
    tints = rng.integers(-15, 16, (n, 3)).tolist()
    sizes = rng.integers(len(_SIZES), size=n).tolist()
    picks = rng.random(n).tolist()
    things: list[Thing] = []
    for x, y in spots:
        if any(max(abs(x - t.x), abs(y - t.y)) < _BOX + 1 for t in things):
            continue
        i = len(things)
        size, sample = _SIZES[sizes[i]], 0
        if families[i] == 0:
            family, name = "shape", SHAPES[shapes[i]]
        elif families[i] == 1:
            label = int(picks[i] * 10)
            samples = _handwritten(split, label)
            sample = int(samples[int((picks[i] * 10 - label) * len(samples))])
            family, name, size = "digit", DIGITS[label], _BOX
        else:
            family, name = "letter", LETTERS[int(picks[i] * len(LETTERS))]
        color = names[colors[i]]
        things.append(Thing(family, name, color, x, y, size, sample, tuple(tints[i])))  # type: ignore[arg-type]
        if len(things) == n:
            break
    return tuple(things)


def mask(thing: Thing) -> np.ndarray:
    """Coverage of an object as a ``(16, 16)`` array of uint8, its centre at ``[8, 8]``."""
    glyphs = _glyphs()
    found: Image
    if thing.family == "digit":
        found = glyphs["digits"][thing.sample]
    elif thing.family == "shape":
        found = glyphs["shapes"][SHAPES.index(thing.name), _SIZES.index(thing.size)]
    else:
        found = glyphs["letters"][LETTERS.index(thing.name), _SIZES.index(thing.size)]
    return found


def draw(split: Split, index: int, things: tuple[Thing, ...]) -> Image:
    """Draw objects over the background of scene ``index``, as ``(96, 96, 3)`` uint8.

    Integers all the way, so that every machine draws the same picture.
    """
    rng = _generator(split, index, 1)
    textures = _glyphs()["textures"]
    which, top, left, flip = rng.integers((len(textures), 97, 97, 4)).tolist()
    texture = textures[which, top : top + SIDE, left : left + SIDE]
    texture = texture[:: 1 - 2 * (flip & 1), :: 1 - (flip & 2)].astype(np.int32)
    base = rng.integers(15, 56, 3)
    image = base + (texture[..., None] * rng.integers(20, 71, 3) >> 8)
    half = _BOX // 2
    for thing in things:
        window = image[thing.y - half : thing.y + half, thing.x - half : thing.x + half]
        color = np.clip(np.add(COLORS[thing.color], thing.tint), 0, 255)
        alpha = mask(thing)[..., None].astype(np.int32)
        window += (color - window) * alpha // 255
    return image.astype(np.uint8)


def caption(things: tuple[Thing, ...]) -> str:
    """All objects in reading order of the 12 x 12 patches, each with its row and column."""
    ordered = sorted(things, key=lambda t: (t.y // 8, t.x // 8))
    return " ".join(describe(t) for t in ordered)


def describe(thing: Thing) -> str:
    """One object as a sentence: ``"A red circle at row 3, column 5, top left."``."""
    row, column = min(thing.y // 8, 11) + 1, min(thing.x // 8, 11) + 1
    return f"A {thing.phrase} at row {row}, column {column}, {thing.region}."


def candidates(things: tuple[Thing, ...], rng: np.random.Generator) -> dict[str, list[Question]]:
    """Every question of each kind that has one right answer in this scene.

    Wrong statements (for ``existence`` and ``relation``) are drawn so that ``yes`` and ``no`` can
    be balanced: half of the objects that do not exist combine a colour and a noun that both do.
    """
    nouns = [t.noun for t in things]
    phrases = [t.phrase for t in things]
    unique = [t for t in things if phrases.count(t.phrase) == 1]
    found: dict[str, list[Question]] = {kind: [] for kind in KINDS}

    def add(kind: str, question: str, answer: str, third: str | None = None) -> None:
        found[kind].append(Question(question, answer, kind, third))

    for t in things:
        if nouns.count(t.noun) == 1:
            add("color", f"What color is the {t.noun}?", t.color, t.third)
        if sum(o.family == t.family and o.color == t.color for o in things) == 1:
            kind = "shape" if t.family == "shape" else "reading"
            add(kind, f"Which {t.family} is {t.color}?", t.name, t.third)
    for t in unique:
        add("existence", f"Is there a {t.phrase}?", "yes", t.third)
        if t.inside_region:
            add("place", f"Where is the {t.phrase}?", t.region, t.third)
    for phrase in _absent(things, rng):
        add("existence", f"Is there a {phrase}?", "no")

    countable = [(f"How many {s}s are there?", nouns.count(s)) for s in SHAPES if s != "cross"]
    countable.append(("How many crosses are there?", nouns.count("cross")))
    for family in ("digit", "letter"):
        number = sum(t.family == family for t in things)
        countable.append((f"How many {family}s are there?", number))
    for color in COLORS:
        number = sum(t.color == color for t in things)
        countable.append((f"How many objects are {color}?", number))
    for question, number in countable:
        if number <= MAX_COUNT:
            add("count", question, str(number))

    for a in unique:
        for b in unique:
            for direction, (dx, dy) in DIRECTIONS.items():
                along = dx * (a.x - b.x) + dy * (a.y - b.y)
                if a is not b and abs(along) >= _RELATION_MARGIN:
                    answer = "yes" if along > 0 else "no"
                    add("relation", f"Is the {a.phrase} {direction} the {b.phrase}?", answer)
    return found


def _absent(things: tuple[Thing, ...], rng: np.random.Generator) -> list[str]:
    """Phrases that fit no object: as many of present colour and noun as of others."""
    phrases = {t.phrase for t in things}
    colors = sorted({t.color for t in things})
    nouns = sorted({t.noun for t in things})
    hard = [f"{c} {n}" for c in colors for n in nouns if f"{c} {n}" not in phrases]
    every = [*SHAPES, *(f"digit {d}" for d in DIGITS), *(f"letter {c}" for c in LETTERS)]
    easy = [f"{c} {n}" for c in COLORS for n in every if c not in colors or n not in nouns]
    n = min(len(hard), 4)
    return [
        *(hard[i] for i in rng.permutation(len(hard))[:n]),
        *(easy[i] for i in rng.integers(len(easy), size=max(n, 1))),
    ]


def _balanced(options: list[Question], rng: np.random.Generator) -> Question:
    """One of ``options``, each answer being equally likely."""
    answers = sorted({q.answer for q in options})
    answer = answers[rng.integers(len(answers))]
    same = [q for q in options if q.answer == answer]
    return same[rng.integers(len(same))]


def choose(things: tuple[Thing, ...], rng: np.random.Generator, each: int) -> tuple[Question, ...]:
    """Up to ``each`` questions of each kind, answers balanced, in random order."""
    chosen: list[Question] = []
    for options in candidates(things, rng).values():
        picked = [_balanced(options, rng) for _ in range(each if options else 0)]
        chosen += dict.fromkeys(picked)
    return tuple(chosen[i] for i in rng.permutation(len(chosen)))


def scene(split: Split, index: int, objects: tuple[int, int] = (4, 10), each: int = 2) -> Scene:
    """Scene ``index`` of a split, always the same.

    Args:
        split: ``"train"``, ``"calibration"`` or ``"test"``.
        index: Number of the scene within the split.
        objects: Fewest and most objects.
        each: How many questions of each kind, at most.
    """
    things = layout(split, index, objects)
    asked = choose(things, _generator(split, index, 2), each)
    return Scene(draw(split, index, things), asked, caption(things), things)


def questions(split: Split, n: int) -> Iterator[tuple[Scene, Question]]:
    """The standard evaluation stream: ``n`` questions, each about a scene of its own.

    Kinds take turns. Within a kind the thirds of the image take turns, as do yes and no, the
    counts from 0 to 4 and the nine places; scenes that cannot ask what is due are passed over.
    """
    indices = count()
    for i in range(n):
        kind, turn = KINDS[i % len(KINDS)], i // len(KINDS)
        for index in indices:
            things = layout(split, index)
            rng = _generator(split, index, 2)
            due = [q for q in candidates(things, rng)[kind] if _is_due(q, turn)]
            if due:
                question = due[rng.integers(len(due))]
                image = draw(split, index, things)
                yield Scene(image, (question,), caption(things), things), question
                break


def _is_due(question: Question, turn: int) -> bool:
    """Whether a question is what the balance of its kind asks for at this turn."""
    third = THIRDS[turn % 3]
    if question.kind in ("color", "shape", "reading"):
        return question.third == third
    if question.kind == "place":
        return question.answer == REGIONS[turn % 3][turn // 3 % 3]
    if question.kind == "count":
        return question.answer == str(turn % (MAX_COUNT + 1))
    if question.answer != ("yes", "no")[turn % 2]:
        return False
    return question.third in (None, THIRDS[turn // 2 % 3])
