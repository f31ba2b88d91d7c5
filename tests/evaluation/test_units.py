"""Intervals of scores that are no mean over questions."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pore.evaluation.cells import Cell, row
from pore.evaluation.harness.scored import units_of
from pore.evaluation.outcome import Answer, Outcome
from pore.evaluation.statistics import score_interval
from pore.evaluation.units import Units


def test_a_mean_is_that_of_the_scores() -> None:
    scores = [0.3, 1.0, 0.0, 0.6] * 10
    units = Units.of_scores(scores)
    assert units.value == pytest.approx(np.mean(scores))
    assert units.interval() == pytest.approx(score_interval(scores), abs=1e-12)
    assert Units.read(json.loads(json.dumps(units.record()))) == units
    assert Units.read(None) is None


def test_draws_stay_within_a_part() -> None:
    """A part that all units agree in adds nothing to the interval."""
    certain, unsure = ("a",) * 50, ("b",) * 50
    units = Units((1.0,) * 50 + (1.0, 0.0) * 25, (1.0,) * 100, certain + unsure, "sum")
    assert units.value == 1.5
    low, high = units.interval()
    alone = Units.of_scores((1.0, 0.0) * 25).interval()
    assert (low, high) == pytest.approx((1 + alone[0], 1 + alone[1]), abs=0.03)


def pope(answers: str, category: bool) -> list[dict[str, str]]:
    """Entries of POPE: two letters each, what is right and what was said."""
    names = {"y": "yes", "n": "no", "x": "maybe"}
    return [
        {"question_id": "7", "score": 0.0, "ground_truth": names[right], "prediction": names[said]}
        | ({"category": "ab"[i % 2]} if category else {})
        for i, (right, said) in enumerate(answers.split())  # type: ignore[str-unpack]
    ]


def test_f1_of_pope() -> None:
    entries = pope("yy yn nn ny yy yx", category=False)
    precision, recall = 2 / 3, 2 / 3  # what is neither yes nor no counts for neither
    f1 = 2 * precision * recall / (precision + recall)
    units = units_of(entries, f1)
    assert units is not None
    assert units.value == pytest.approx(f1)
    low, high = units.interval()
    assert 0 <= low < f1 < high <= 1
    assert units_of(entries, f1 + 0.01) is None  # some other score
    split = pope("yy yy yn nn nn ny", category=True)
    both = units_of(split, (2 * 1 / (2 + 1) + 2 * 1 / (2 + 1)) / 2)
    assert both is not None
    assert set(both.parts) == {"a", "b"}


def test_images_of_mme() -> None:
    """Two questions an image: a category has accuracy plus that of both, in percent."""
    right = {"existence": ((1, 1), (1, 0), (0, 0)), "OCR": ((1, 1), (1, 1))}
    entries = [
        {"question_id": f"{i}.png", "category": category, "score": float(score)}
        for category, images in right.items()
        for i, image in enumerate(images)
        for score in image
    ]
    worth = (200 + 50 + 0) / 3 + 200
    units = units_of([None, *entries, None], worth)
    assert units is not None
    assert len(units.above) == 5
    low, high = units.interval()
    assert low == pytest.approx(200)  # of three images none right; those of the other are certain
    assert high == pytest.approx(400)


def test_categories_of_mmstar() -> None:
    entries = [
        {"question_id": str(i), "l2_category": name, "score": score}
        for i, (name, score) in enumerate([("a", 1.0), ("a", 0.0), ("b", 1.0)])
    ]
    units = units_of(entries, 0.75)
    assert units is not None
    assert units.interval() == (0.5, 1.0)


def test_what_is_not_known_has_no_interval() -> None:
    assert units_of([1.0, 0.0], 0.5) is None
    assert units_of([], 0.5) is None
    assert units_of([{"anls": 0.2}], 0.2) is None


def test_a_row_over_benchmarks_of_all_kinds_has_an_interval() -> None:
    def cell(right: int, units: Units | None) -> Cell:
        answers = tuple(
            Answer(str(i), "q", "x", "x", i < right, None, None, (), 100) for i in range(10)
        )
        outcome = Outcome(None, answers)
        if units is None:
            return Cell(outcome, "accuracy", 100 * outcome.accuracy, outcome.ci)
        return Cell(outcome, "points", units.value, units.interval(), units=units)

    images = Units((200.0, 50.0, 100.0) * 4, (1.0,) * 12, ("a", "b") * 6, "sum")
    half = Units(tuple(x / 2 for x in images.above), images.below, images.parts, "sum")
    cells = {"a": cell(6, None), "mme": cell(0, half)}
    found = row(("FastV", None, 4), cells, {"a": cell(8, None), "mme": cell(0, images)}, [*cells])
    assert found.relative == pytest.approx((0.75 + 0.5) / 2)
    assert found.relative_ci is not None
    low, high = found.relative_ci
    assert low < 0.625 < high
