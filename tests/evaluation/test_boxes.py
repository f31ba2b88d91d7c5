"""Boxes in answers, and what follows from the box of a sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pore.data.files import from_jsonl
from pore.data.samples import Sample
from pore.errors import InputError
from pore.evaluation.batches import Batches
from pore.evaluation.boxes import box_in, overlap
from pore.evaluation.metrics import judged
from pore.evaluation.outcome import Outcome
from pore.evaluation.running import evaluate

shares = st.floats(0, 1)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[0.1, 0.2, 0.5, 0.9]", (0.1, 0.2, 0.5, 0.9)),
        ("<box>(100,200),(500,900)</box>", (0.1, 0.2, 0.5, 0.9)),
        ("It is at [0, 0, 1, 1].", (0.0, 0.0, 1.0, 1.0)),
        ("[0.5, 0.2, 0.1, 0.9]", None),  # its left is right of its right
        ("[100, 200, 500]", None),
        ("[100, 200, 500, 1900]", None),
        ("left", None),
    ],
)
def test_boxes_in_text(text: str, box: Any) -> None:
    assert box_in(text) == (None if box is None else pytest.approx(box))


@given(st.tuples(shares, shares, shares, shares), st.tuples(shares, shares, shares, shares))
def test_overlap_is_a_symmetric_share(one: Any, other: Any) -> None:
    first, second = (
        (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])) for b in (one, other)
    )
    assert 0 <= overlap(first, second) <= 1
    assert overlap(first, second) == overlap(second, first)


def test_overlap_by_hand() -> None:
    assert overlap((0, 0, 0.5, 1), (0.25, 0, 0.75, 1)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 0.2, 0.2), (0.5, 0.5, 1, 1)) == 0
    assert overlap((0.2, 0.2, 0.6, 0.6), (0.2, 0.2, 0.6, 0.6)) == pytest.approx(1)


def test_what_a_box_says_of_a_sample() -> None:
    grounding = Sample("a", None, "where?", box=(0.0, 0.7, 0.4, 1.0))
    assert (grounding.third, grounding.kind) == ("bottom", "grounding")
    assert judged(grounding, "[0, 700, 400, 1000]") == (True, pytest.approx(1.0), None)
    assert judged(grounding, "nowhere") == (False, 0.0, None)
    named = Sample("a", None, "what?", "cat", kind="animal", box=(0.0, 0.1, 0.4, 0.2))
    assert (named.third, named.kind) == ("top", "animal")
    assert judged(named, "Cat.") == (True, None, None)
    assert Sample("a", None, "q", "x", third="top", box=(0, 0.8, 1, 1)).third == "top"


def test_boxes_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"

    def write(box: Any) -> None:
        path.write_text(json.dumps({"image": "a.png", "question": "q", "box": box}))

    write([0.1, 0.4, 0.3, 0.6])
    (sample,) = from_jsonl(path)
    assert (sample.box, sample.third, sample.answer) == ((0.1, 0.4, 0.3, 0.6), "middle", None)
    for wrong in ([10, 20, 30, 40], [0.1, 0.2, 0.3], "box", [0.5, 0, 0.2, 1], [True, 0, 1, 1]):
        write(wrong)
        with pytest.raises(InputError, match=r"line 1.*from 0 to 1"):
            from_jsonl(path)


def test_a_model_that_is_asked_for_boxes(model: Any, processor: Any, samples: list[Any]) -> None:
    asked = [Sample(s.id, s.image, s.question, box=(0.1, 0.1, 0.5, 0.9)) for s in samples]
    assert not Batches(model, processor, asked).skipped
    found: Outcome = evaluate(model, processor, asked, max_new_tokens=2)
    assert found.iou == 0.0  # words alone
    assert found.record()["accuracy_by_kind"] == {"grounding": 0.0}
    assert found.answers[0].expected == "[0.1, 0.1, 0.5, 0.9]"
