"""Procedural videos with questions, for the embedded video model.

A video is eight frames of the world of `pore.embedded.scenes`: three to six objects on one
background, of which one or two stay, one or two move along a straight line from the first frame to
the last, and one or two appear in the second, fourth, sixth or eighth frame and stay from then on.

Videos are a function of ``(split, index)``, drawn from the splits and the handwriting of the
scenes, with seeds of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

import numpy as np

from pore.embedded.asking import Question
from pore.embedded.drawing import Image, draw
from pore.embedded.splits import Split, generator
from pore.embedded.things import BOX, PLACES, SIDE, Thing, things_of

FRAMES = 8
"""How many frames a video has."""

KINDS = ("direction", "place", "moment", "motion")

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""The ways in which objects move, with the change of column and row."""

MOMENTS = (2, 4, 6, 8)
"""The frames in which objects appear, counted from 1."""

SHORTEST, LONGEST = 32, 64
"""How far an object moves, in pixels."""

_TRIES = 60


@dataclass(frozen=True)
class Track:
    """One object of a video.

    Attributes:
        thing: The object, where it is in the first of its frames.
        does: Whether it stays where it is from the first frame to the last, moves, or appears.
        way: Where it moves to: a key of `DIRECTIONS`; otherwise None.
        distance: How far it has moved in the last frame, in pixels.
        first: The first frame that shows it, counted from 1.
    """

    thing: Thing
    does: Literal["stay", "move", "appear"]
    way: str | None = None
    distance: int = 0
    first: int = 1

    def at(self, frame: int) -> Thing | None:
        """The object where it is in a frame, counted from 1; None where it is not shown."""
        if frame < self.first:
            return None
        if self.way is None:
            return self.thing
        dx, dy = DIRECTIONS[self.way]
        gone = self.distance * (frame - 1) // (FRAMES - 1)
        return replace(self.thing, x=self.thing.x + dx * gone, y=self.thing.y + dy * gone)

    @property
    def last(self) -> Thing:
        """The object where it is in the last frame."""
        found = self.at(FRAMES)
        assert found is not None
        return found

    def clear_of(self, other: Track) -> bool:
        """Whether the two never touch, wherever on their ways they are."""
        gaps = (
            max(min(a) - max(b), min(b) - max(a))
            for a, b in (
                ((self.thing.x, self.last.x), (other.thing.x, other.last.x)),
                ((self.thing.y, self.last.y), (other.thing.y, other.last.y)),
            )
        )
        return max(gaps) >= BOX + 1


@dataclass(frozen=True)
class Video:
    """A video with its objects and a question.

    Attributes:
        frames: ``(8, 96, 96, 3)`` array of uint8.
        question: What is asked.
        tracks: The objects.
    """

    frames: Image
    question: Question
    tracks: tuple[Track, ...]


def tracks_of(split: Split, index: int) -> tuple[Track, ...]:
    """The objects of a video, without drawing it: those that move, that appear, and that stay.

    Args:
        split: Which seeds and which handwritten digits to draw from.
        index: Number of the video within the split.
    """
    rng = generator(split, index, 5)
    things = {t.phrase: t for t in things_of(split, index, (10, 10), purpose=6)}
    moving, appearing, staying = rng.integers(1, 3, 3).tolist()
    roles = ("move",) * moving + ("appear",) * appearing + ("stay",) * staying
    tracks: list[Track] = []
    for role, thing in zip(roles, things.values(), strict=False):
        for _ in range(_TRIES):
            track = _track(role, thing, rng)
            if track is not None and all(track.clear_of(other) for other in tracks):
                tracks.append(track)
                break
    return tuple(tracks)


def _track(
    does: Literal["stay", "move", "appear"], thing: Thing, rng: np.random.Generator
) -> Track | None:
    """One object somewhere, on its way; None if it would leave the picture."""
    low, high = BOX // 2, SIDE - BOX // 2
    x, y, which, distance = rng.integers(
        (low, low, 0, SHORTEST), (high + 1, high + 1, 4, LONGEST + 1)
    ).tolist()
    placed = replace(thing, x=x, y=y)
    if does == "stay":
        return Track(placed, does)
    if does == "appear":
        return Track(placed, does, first=MOMENTS[which])
    track = Track(placed, does, tuple(DIRECTIONS)[which], distance)
    inside = all(low <= c <= high for c in (track.last.x, track.last.y))
    return track if inside else None


def frames(split: Split, index: int, tracks: tuple[Track, ...]) -> Image:
    """Draw a video, as ``(8, 96, 96, 3)`` uint8."""
    drawn = []
    for frame in range(1, FRAMES + 1):
        shown = tuple(thing for t in tracks if (thing := t.at(frame)) is not None)
        drawn.append(draw(split, index, shown))
    return np.stack(drawn)


def candidates(tracks: tuple[Track, ...]) -> dict[str, list[Question]]:
    """Every question of each kind that has one right answer in this video."""
    found: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    for track in tracks:
        phrase = track.thing.phrase
        if track.does == "move":
            way = Question(f"Which way does the {phrase} move?", str(track.way), "direction")
            found["direction"].append(way)
            for when, thing in (("start", track.thing), ("end", track.last)):
                text = f"Where is the {phrase} at the {when}?"
                if thing.clear_of_borders:
                    found["place"].append(Question(text, thing.place, "place", thing.third))
        if track.does == "appear":
            text = f"In which frame does the {phrase} appear?"
            found["moment"].append(Question(text, str(track.first), "moment"))
        moves = "yes" if track.does == "move" else "no"
        found["motion"].append(Question(f"Does the {phrase} move?", moves, "motion"))
    return found


def questions(split: Split, n: int) -> Iterator[Video]:
    """The standard evaluation stream: ``n`` questions, each about its own video.

    Kinds take turns. Within a kind its answers take turns: the four directions, the nine places at
    the start and at the end, the four moments, and yes and no. Videos in which the next question
    cannot be asked are skipped.
    """
    indices = count()
    for i in range(n):
        kind, turn = KINDS[i % len(KINDS)], i // len(KINDS)
        for index in indices:
            tracks = tracks_of(split, index)
            due = [q for q in candidates(tracks)[kind] if _is_due(q, turn)]
            if due:
                question = due[generator(split, index, 7).integers(len(due))]
                yield Video(frames(split, index, tracks), question, tracks)
                break


def _is_due(question: Question, turn: int) -> bool:
    """Whether a question is the one that keeps its kind balanced at this turn."""
    if question.kind == "direction":
        return question.answer == tuple(DIRECTIONS)[turn % 4]
    if question.kind == "moment":
        return question.answer == str(MOMENTS[turn % 4])
    if question.kind == "motion":
        return question.answer == ("yes", "no")[turn % 2]
    asked = ("start?", "end?")[turn % 2]
    place = PLACES[turn // 2 % 3][turn // 6 % 3]
    return question.question.endswith(asked) and question.answer == place
