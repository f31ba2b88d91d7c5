"""torch.compile and FlexAttention, which take long to build: CI only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pore
from helpers.models import batch, prompt, tiny_llava

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("when", ["inside the block", "before the block"])
@pytest.mark.in_ci(1)
def test_a_compiled_model_is_pruned(when: str) -> None:
    """Hooks break the graph; what is computed stays the same, inside the block and after it."""
    model = tiny_llava(dtype=torch.float32)
    inputs = batch([prompt(3, 1, 5)], dtype=torch.float32)
    with torch.no_grad():
        dense = model(**inputs).logits
        with pore.FastV(keep=4)(model):
            short = model(**inputs).logits
        compiled = torch.compile(model, backend="eager")
        if when == "before the block":
            torch.testing.assert_close(compiled(**inputs).logits, dense)
        with pore.FastV(keep=4)(compiled) as run:
            for _ in range(2):
                torch.testing.assert_close(compiled(**inputs).logits, short)
        assert len(run.report) == 2
        torch.testing.assert_close(compiled(**inputs).logits, dense)


@pytest.mark.exhaustive
def test_flex_attention() -> None:
    model = tiny_llava(dtype=torch.float32)
    inputs = batch([prompt(3, 1, 5), prompt(7, 1, 2, 1)], dtype=torch.float32)
    with torch.no_grad():
        with pore.FastV(keep=4)(model):
            expected = model(**inputs).logits
        model.set_attn_implementation({"text_config": "flex_attention"})
        with pore.FastV(keep=4)(model):
            got = model(**inputs).logits
    # The first row is padded on the left: what it gives there is arbitrary.
    torch.testing.assert_close(got[0, -12:], expected[0, -12:], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-3, atol=1e-3)
