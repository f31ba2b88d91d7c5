"""The videos: deterministic, balanced, their answers true."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from pore.data.sources import load_samples
from pore.embedded import videos
from pore.embedded.asking import Question
from pore.embedded.drawing import draw
from pore.embedded.splits import SPLITS, Split
from pore.embedded.things import Thing
from pore.errors import InputError


def test_videos_are_the_same_on_every_machine() -> None:
    made = [videos.frames("test", i, videos.tracks_of("test", i)) for i in range(3)]
    assert {each.shape for each in made} == {(8, 96, 96, 3)}
    digest = hashlib.sha256(b"".join(each.tobytes() for each in made)).hexdigest()
    assert digest[:16] == "05a90e6b7a83ca06"


def test_splits_do_not_share_videos_or_handwriting() -> None:
    seen = {split: [videos.tracks_of(split, i) for i in range(100)] for split in SPLITS}
    samples = {
        split: {t.thing.sample for ts in made for t in ts if t.thing.category == "digit"}
        for split, made in seen.items()
    }
    for a in SPLITS:
        for b in SPLITS:
            if a != b:
                assert not set(seen[a]) & set(seen[b])
                assert {a, b} == {"test", "fresh"} or not samples[a] & samples[b]


def test_objects_stay_inside_and_never_touch() -> None:
    for i in range(60):
        tracks = videos.tracks_of("train", i)
        assert 3 <= len(tracks) <= 6
        assert len({t.thing.phrase for t in tracks}) == len(tracks)
        for frame in range(1, 9):
            things = [thing for t in tracks if (thing := t.at(frame)) is not None]
            assert all(8 <= c <= 88 for t in things for c in (t.x, t.y))
            for k, a in enumerate(things):
                assert all(max(abs(a.x - b.x), abs(a.y - b.y)) > 16 for b in things[:k])


def places(tracks: tuple[videos.Track, ...]) -> dict[str, list[Thing | None]]:
    """Where every object is in every frame."""
    return {t.thing.phrase: [t.at(frame) for frame in range(1, 9)] for t in tracks}


def true_answer(where: dict[str, list[Thing | None]], asked: Question) -> str:
    """The answer, worked out from where the objects are in every frame."""
    text = asked.question.rstrip("?")
    (phrase,) = (p for p in where if f"the {p} " in text)
    at = where[phrase]
    shown = [thing for thing in at if thing is not None]
    if text.startswith("Does"):
        return "yes" if shown[0] != shown[-1] else "no"
    if text.startswith("In which frame"):
        return str(at.index(shown[0]) + 1)
    if text.startswith("Where"):
        return (shown[0] if text.endswith("start") else shown[-1]).place
    across, down = shown[-1].x - shown[0].x, shown[-1].y - shown[0].y
    assert (across == 0) != (down == 0)
    return ("left" if across < 0 else "right") if across else ("up" if down < 0 else "down")


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_right(split: Split) -> None:
    kinds: Counter[str] = Counter()
    for i in range(60):
        tracks = videos.tracks_of(split, i)
        for options in videos.candidates(tracks).values():
            for asked in options:
                assert asked.answer == true_answer(places(tracks), asked), asked
                kinds[asked.kind] += 1
    assert set(kinds) == set(videos.KINDS)


def test_frames_show_the_objects_where_they_are() -> None:
    tracks = videos.tracks_of("test", 4)
    made = videos.frames("test", 4, tracks)
    for number in (1, 4, 8):
        shown = tuple(thing for t in tracks if (thing := t.at(number)) is not None)
        assert np.array_equal(made[number - 1], draw("test", 4, shown))
    assert not np.array_equal(made[0], made[7])


def test_kinds_and_answers_take_turns() -> None:
    asked = [video.question for video in videos.questions("calibration", 72)]
    assert [q.kind for q in asked[:8]] == [*videos.KINDS] * 2
    answers = {kind: Counter(q.answer for q in asked if q.kind == kind) for kind in videos.KINDS}
    assert set(answers["direction"]) == set(videos.DIRECTIONS)
    assert set(answers["moment"]) == {"2", "4", "6", "8"}
    assert max(answers["direction"].values()) - min(answers["direction"].values()) <= 1
    assert len(answers["place"]) == 9
    assert answers["motion"] == {"yes": 9, "no": 9}


def test_videos_are_samples() -> None:
    (first, *_) = found = list(load_samples("embedded:fresh:video", limit=4))
    assert [sample.kind for sample in found] == list(videos.KINDS)
    video = first.load()
    assert len(video.frames) == 8
    with pytest.raises(InputError, match="about a video, and this is for images"):
        first.load_image()
    with pytest.raises(InputError, match="as videos, embedded:test:video"):
        load_samples("embedded:tset:video", limit=1)
