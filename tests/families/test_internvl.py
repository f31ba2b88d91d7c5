"""InternVL beyond what every family is asked: tiles told by the prompt, by runs of whole tiles."""

from __future__ import annotations

import pytest
import torch

import pore
from cases import CASES
from pore.errors import InputError

(CASE,) = (case for case in CASES if case.name == "InternVL")


def test_a_run_that_is_no_whole_tiles_is_refused() -> None:
    inputs = CASE.inputs([[5, -2, 6, -4, 7, 8]])
    ids = inputs["input_ids"][0]
    first = int((ids == CASE.placeholder).nonzero()[0])
    ids[[first, first - 1]] = ids[[first - 1, first]]  # the total stays, the first run is broken
    wrong = pytest.raises(InputError, match=r"Image 0 of sample 0 has 1 visual tokens")
    with wrong, torch.no_grad(), pore.FastV(keep=4)(CASE.model()):
        CASE.model()(**inputs)


def test_the_prompt_is_found_however_generate_is_given_it() -> None:
    inputs = CASE.inputs([[5, -2, 6, -1, 7, 8]])
    ids, settings = inputs.pop("input_ids"), {"max_new_tokens": 2, "do_sample": False}
    with torch.no_grad(), pore.VisionZip(keep=4)(CASE.model()) as run:
        for args, named in (
            ((), {"input_ids": ids}),
            ((ids,), {}),
            ((), {"inputs": ids}),
            ((), {"inputs": None, "input_ids": ids}),
            ((None,), {"input_ids": ids}),
        ):
            CASE.model().generate(*args, **named, **inputs, **settings)
    first, *others = (sample.images for sample in run.report)
    assert len(others) == 4
    assert all(images == first for images in others)
