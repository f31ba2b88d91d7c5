"""The scenes: deterministic, balanced, their answers true."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from pore.embedded import scenes
from pore.embedded.asking import DIRECTIONS, KINDS, Question, candidates
from pore.embedded.drawing import draw, opacity
from pore.embedded.splits import SPLITS, Split
from pore.embedded.things import COLORS, SIDE, Thing, things_of


def test_a_scene_is_a_function_of_split_and_index() -> None:
    first, again = scenes.scene("test", 5), scenes.scene("test", 5)
    assert np.array_equal(first.image, again.image)
    assert first.questions == again.questions
    assert first.things == again.things


def test_pictures_are_the_same_on_every_machine() -> None:
    images = b"".join(scenes.scene("test", i).image.tobytes() for i in range(4))
    assert hashlib.sha256(images).hexdigest()[:16] == "abcc3bed45e86753"


def test_splits_do_not_share_scenes_or_handwriting() -> None:
    seen: dict[str, set[bytes]] = {}
    samples: dict[str, set[int]] = {}
    for split in SPLITS:
        layouts = [things_of(split, i) for i in range(200)]
        seen[split] = {repr(things).encode() for things in layouts}
        samples[split] = {t.sample for ts in layouts for t in ts if t.category == "digit"}
    for a in SPLITS:
        for b in SPLITS:
            if a != b:
                assert not seen[a] & seen[b]
                assert {a, b} == {"test", "fresh"} or not samples[a] & samples[b]


def test_images_are_square_bytes() -> None:
    image = scenes.scene("train", 0).image
    assert image.shape == (96, 96, 3)
    assert image.dtype == np.uint8


def test_objects_do_not_touch_and_stay_inside() -> None:
    for i in range(100):
        things = things_of("train", i)
        assert 4 <= len(things) <= 10
        for t in things:
            assert 8 <= t.x <= 88
            assert 8 <= t.y <= 88
        for k, a in enumerate(things):
            for b in things[:k]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) > 16


def test_an_object_shows_its_color_where_it_stands() -> None:
    things = things_of("test", 3)
    image = draw("test", 3, things).astype(int)
    for t in things:
        window = image[t.y - 8 : t.y + 8, t.x - 8 : t.x + 8]
        solid = opacity(t) > 250
        expected = np.clip(np.add(COLORS[t.color], t.tint), 0, 255)
        assert np.abs(window[solid].mean(0) - expected).max() < 6


def matching(things: tuple[Thing, ...], words: str) -> list[Thing]:
    return [t for t in things if words in (t.phrase, t.noun)]


def true_answer(things: tuple[Thing, ...], q: Question) -> str:
    """The answer, worked out from the words of the question alone."""
    text = q.question.rstrip("?")
    if text.startswith("What color is the "):
        (thing,) = matching(things, text.removeprefix("What color is the "))
        return thing.color
    if text.startswith("Which "):
        category, _, color = text.removeprefix("Which ").split()
        (thing,) = [t for t in things if (t.category, t.color) == (category, color)]
        return thing.name
    if text.startswith("Is there a "):
        return "yes" if matching(things, text.removeprefix("Is there a ")) else "no"
    if text.startswith("Where is the "):
        (thing,) = matching(things, text.removeprefix("Where is the "))
        return thing.place
    if text.startswith("How many objects are "):
        return str(sum(t.color == text.split()[-1] for t in things))
    if text.startswith("How many "):
        plural = text.split()[2]
        noun = plural.removesuffix("es") if plural == "crosses" else plural.removesuffix("s")
        return str(sum(noun in (t.category, t.name) for t in things))
    for direction, (dx, dy) in DIRECTIONS.items():
        if f" {direction} the " in text:
            left, right = text.removeprefix("Is the ").split(f" {direction} the ")
            (a,), (b,) = matching(things, left), matching(things, right)
            return "yes" if dx * (a.x - b.x) + dy * (a.y - b.y) > 0 else "no"
    raise AssertionError(q)


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_right(split: Split) -> None:
    kinds: Counter[str] = Counter()
    for i in range(80):
        things = things_of(split, i)
        for options in candidates(things, np.random.default_rng(i)).values():
            for q in options:
                assert q.answer == true_answer(things, q), q
                kinds[q.kind] += 1
    assert set(kinds) == set(KINDS)


def test_half_of_what_is_not_there_is_hard_to_deny() -> None:
    hard = easy = 0
    for i in range(200):
        things = things_of("test", i)
        options = candidates(things, np.random.default_rng(i))["existence"]
        for q in options:
            if q.answer == "no":
                words = q.question.removeprefix("Is there a ").rstrip("?")
                color, noun = words.split(" ", 1)
                both = any(t.color == color for t in things) and any(t.noun == noun for t in things)
                hard, easy = hard + both, easy + (not both)
    assert 0.45 < hard / (hard + easy) < 0.55


@pytest.mark.slow
def test_the_stream_is_balanced() -> None:
    asked = [q for _, q in scenes.questions("test", 630)]
    per_kind = Counter(q.kind for q in asked)
    assert set(per_kind.values()) == {90}
    for kind in ("existence", "relation"):
        assert Counter(q.answer for q in asked if q.kind == kind) == {"yes": 45, "no": 45}
    assert set(Counter(q.answer for q in asked if q.kind == "count").values()) == {18}
    places = Counter(q.answer for q in asked if q.kind == "place")
    assert len(places) == 9
    assert set(places.values()) == {10}
    for kind in ("color", "shape", "reading", "place"):
        thirds = Counter(q.third for q in asked if q.kind == kind)
        assert set(thirds.values()) == {30}


def test_the_stream_is_the_same_every_time_and_a_longer_one_goes_on() -> None:
    short = [q for _, q in scenes.questions("calibration", 14)]
    longer = [q for _, q in scenes.questions("calibration", 21)]
    assert longer[:14] == short


def test_scenes_of_mixed_sizes_show_the_same_objects_further_apart() -> None:
    pairs = list(scenes.questions("test", 42))
    mixed = list(scenes.questions("test", 42, mixed=True))
    assert [q for _, q in mixed] == [q for _, q in pairs]
    assert [scene.things for scene, _ in mixed] == [scene.things for scene, _ in pairs]
    sizes = {(scene.image.shape[1], scene.image.shape[0]) for scene, _ in mixed}
    assert sizes == set(scenes.SIZES)
    for (scene, _), (small, _) in zip(mixed, pairs, strict=True):
        height, width = scene.image.shape[:2]
        for thing in scene.things:
            y, x = thing.y * height // SIDE, thing.x * width // SIDE
            shown = opacity(thing) == 255  # where nothing of the background is seen
            box = scene.image[y - 8 : y + 8, x - 8 : x + 8]
            own = small.image[thing.y - 8 : thing.y + 8, thing.x - 8 : thing.x + 8]
            np.testing.assert_array_equal(box[shown], own[shown])


def test_the_caption_names_every_object_in_reading_order() -> None:
    scene = scenes.scene("train", 1)
    assert scene.caption.count(".") == len(scene.things)
    rows = [int(s.split("row ")[1].split(",")[0]) for s in scene.caption.split(". ")]
    assert rows == sorted(rows)
