"""InternVL beyond what every family is asked: runs that are no whole tiles."""

from __future__ import annotations

import pytest
import torch

import pore
from family_cases import CASES
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
