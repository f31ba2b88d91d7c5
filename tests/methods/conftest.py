"""Two models of different depths, and what the small one looked at, for the tests of SGL."""

from __future__ import annotations

from typing import Any

import pytest

import pore
from helpers.guiding import PROMPTS, STEPS
from helpers.models import batch, tiny_llava


@pytest.fixture(scope="module")
def small() -> Any:
    return tiny_llava(layers=3)


@pytest.fixture(scope="module")
def large() -> Any:
    return tiny_llava(layers=5, seed=1)


@pytest.fixture(scope="module")
def guide(small: Any) -> pore.Guide:
    return pore.guide(small, batch(PROMPTS), max_new_tokens=STEPS)
