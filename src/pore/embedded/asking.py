"""Questions about the objects of a scene, and sentences that describe them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pore.embedded.things import COLORS, DIGITS, LETTERS, PLACES, SHAPES, THIRDS, Thing

KINDS = ("color", "shape", "existence", "place", "count", "relation", "reading")

MAX_COUNT = 4
"""The largest answer to a question about a number of objects."""

DIRECTIONS = {
    "above": (0, -1),
    "below": (0, 1),
    "left of": (-1, 0),
    "right of": (1, 0),
}

_RELATION_MARGIN = 14


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        question: The text, such as ``"What color is the circle?"``.
        answer: The one right answer, such as ``"red"``.
        kind: One of `KINDS`.
        third: Third of the image in which the object asked for lies (``"top"``, ``"middle"``,
            ``"bottom"``), or None if the question is not about a single object.
    """

    question: str
    answer: str
    kind: str
    third: str | None = None


def caption(things: tuple[Thing, ...]) -> str:
    """All objects in reading order of the 12 x 12 patches, each with its row and column."""
    ordered = sorted(things, key=lambda t: (t.y // 8, t.x // 8))
    return " ".join(describe(t) for t in ordered)


def describe(thing: Thing) -> str:
    """One object as a sentence: ``"A red circle at row 3, column 5, top left."``."""
    row, column = min(thing.y // 8, 11) + 1, min(thing.x // 8, 11) + 1
    return f"A {thing.phrase} at row {row}, column {column}, {thing.place}."


def candidates(things: tuple[Thing, ...], rng: np.random.Generator) -> dict[str, list[Question]]:
    """Every question of each kind that has one right answer in this scene.

    Wrong statements (for ``existence`` and ``relation``) are drawn so that ``yes`` and ``no`` can
    be balanced: half of the absent objects combine a colour and a noun that both occur.
    """
    found: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    for question in (
        *_attributes(things),
        *_existence(things, rng),
        *_places(things),
        *_counts(things),
        *_relations(things),
    ):
        found[question.kind].append(question)
    return found


def _unique(things: tuple[Thing, ...]) -> list[Thing]:
    """The objects that colour and noun together distinguish from all others."""
    phrases = [t.phrase for t in things]
    return [t for t in things if phrases.count(t.phrase) == 1]


def _attributes(things: tuple[Thing, ...]) -> Iterator[Question]:
    """Questions such as what colour the only circle has, or which shape is the only red one."""
    nouns = [t.noun for t in things]
    for t in things:
        if nouns.count(t.noun) == 1:
            yield Question(f"What color is the {t.noun}?", t.color, "color", t.third)
        if sum(o.category == t.category and o.color == t.color for o in things) == 1:
            kind = "shape" if t.category == "shape" else "reading"
            yield Question(f"Which {t.category} is {t.color}?", t.name, kind, t.third)


def _existence(things: tuple[Thing, ...], rng: np.random.Generator) -> Iterator[Question]:
    for t in _unique(things):
        yield Question(f"Is there a {t.phrase}?", "yes", "existence", t.third)
    for phrase in _absent(things, rng):
        yield Question(f"Is there a {phrase}?", "no", "existence")


def _places(things: tuple[Thing, ...]) -> Iterator[Question]:
    for t in _unique(things):
        if t.clear_of_borders:
            yield Question(f"Where is the {t.phrase}?", t.place, "place", t.third)


def _counts(things: tuple[Thing, ...]) -> Iterator[Question]:
    nouns = [t.noun for t in things]
    countable = [(f"{s}s are there", nouns.count(s)) for s in SHAPES if s != "cross"]
    countable.append(("crosses are there", nouns.count("cross")))
    for category in ("digit", "letter"):
        countable.append((f"{category}s are there", sum(t.category == category for t in things)))
    for color in COLORS:
        countable.append((f"objects are {color}", sum(t.color == color for t in things)))
    for what, number in countable:
        if number <= MAX_COUNT:
            yield Question(f"How many {what}?", str(number), "count")


def _relations(things: tuple[Thing, ...]) -> Iterator[Question]:
    for a, b in itertools.permutations(_unique(things), 2):
        for direction, (dx, dy) in DIRECTIONS.items():
            along = dx * (a.x - b.x) + dy * (a.y - b.y)
            if abs(along) >= _RELATION_MARGIN:
                answer = "yes" if along > 0 else "no"
                yield Question(f"Is the {a.phrase} {direction} the {b.phrase}?", answer, "relation")


def _absent(things: tuple[Thing, ...], rng: np.random.Generator) -> list[str]:
    """Phrases that fit no object: half of them with a present colour and a present noun."""
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
    """One of ``options``, so that each answer is equally likely."""
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


def is_due(question: Question, turn: int) -> bool:
    """Whether a question is the one that keeps its kind balanced at this turn."""
    third = THIRDS[turn % 3]
    if question.kind in ("color", "shape", "reading"):
        return question.third == third
    if question.kind == "place":
        return question.answer == PLACES[turn % 3][turn // 3 % 3]
    if question.kind == "count":
        return question.answer == str(turn % (MAX_COUNT + 1))
    if question.answer != ("yes", "no")[turn % 2]:
        return False
    return question.third in (None, THIRDS[turn // 2 % 3])
