"""Pictures of any size with the objects that questions are about."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from canvas import PATCH, asked, canvas

from pore.embedded.drawing import draw
from pore.embedded.things import THIRDS, things_of


def test_at_96_pixels_it_is_the_scene_of_the_package() -> None:
    shown = canvas("calibration", 11, 96)
    assert shown.things == things_of("calibration", 11)
    np.testing.assert_array_equal(shown.image, draw("calibration", 11, shown.things))


@pytest.mark.parametrize("side", [128, 192])
def test_larger_pictures_have_more_objects_that_do_not_touch(side: int) -> None:
    shown = [canvas("train", i, side) for i in range(8)]
    assert all(one.image.shape == (side, side, 3) for one in shown)
    for one in shown:
        for a, b in combinations(one.things, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > 16
        for t in one.things:
            assert min(t.x, t.y) >= 8
            assert max(t.x, t.y) <= side - 8
    density = np.mean([len(one.things) for one in shown]) / side**2
    usual = np.mean([len(things_of("train", i)) for i in range(60)]) / 96**2
    assert 0.75 < density / usual < 1.35


def test_they_are_always_the_same() -> None:
    one, same = canvas("test", 3, 128), canvas("test", 3, 128)
    assert one.things == same.things
    np.testing.assert_array_equal(one.image, same.image)
    assert canvas("calibration", 3, 128).things != one.things


@pytest.mark.parametrize("side", [96, 192])
def test_patches_are_those_of_the_objects_asked_about(side: int) -> None:
    for one in asked("train", 100, 21, side):
        assert one.patches.any()
        named = [t for t in one.canvas.things if one.patches[one.canvas.coverage(t).argmax()]]
        assert named
        shown = np.any([one.canvas.covers(t) for t in named], 0)
        assert not (one.patches & ~shown).any()
        if one.question.kind in ("color", "shape", "reading", "existence"):
            (thing,) = named
            words = (thing.noun, thing.color, thing.category)
            assert any(word in one.question.question for word in words)
            grid = side // PATCH
            row = thing.y * grid // side
            assert one.patches.reshape(grid, grid)[max(row - 1, 0) : row + 2].any()


def test_thirds_take_turns() -> None:
    colors = [one for one in asked("train", 0, 43, 96) if one.question.kind == "color"]
    assert [one.question.third for one in colors] == [THIRDS[i % 3] for i in range(len(colors))]
    assert len({one.index for one in colors}) == len(colors)
