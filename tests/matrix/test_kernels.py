"""Attention functions of the user's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from helpers.engine import tolerance
from helpers.methods import DRAWING, EVERY, KEEP, model_of, under, usual
from helpers.models import batch, prompt


@pytest.fixture
def _mine() -> Iterator[None]:
    """One without a mask function, which transformers gives no masks where there is no padding."""
    AttentionInterface.register("mine", sdpa_attention_forward)
    config = model_of().model.language_model.config
    config._attn_implementation_internal = "mine"
    yield
    config._attn_implementation_internal = "sdpa"


@pytest.mark.usefixtures("_mine")
@pytest.mark.parametrize("name", [name for name in EVERY if name not in DRAWING])
def test_rows_that_keep_different_numbers(name: str) -> None:
    """A batch without padding, of which one row has an image more: what is left is padded."""
    model, inputs = model_of(), batch([prompt(3, 2, 5), prompt(21, 1, 5, 1)])
    assert bool(inputs["attention_mask"].all())
    del inputs["attention_mask"]
    config = model.model.language_model.config
    settings = {"max_new_tokens": 3, "do_sample": False, "output_logits": True}
    found = []
    for kernel in ("mine", "sdpa"):
        config._attn_implementation_internal = kernel
        with torch.no_grad(), under("mine", usual(name, KEEP))(model) as run:
            logits = model(**inputs).logits
            cached = model.generate(**inputs, **settings, return_dict_in_generate=True).logits
        found.append((logits, torch.stack(cached), [sample.images for sample in run.report]))
    (got, steps, kept), (expected, wanted, same) = found
    assert kept == same
    torch.testing.assert_close(got[:, -3:], expected[:, -3:], **tolerance("sdpa"))
    torch.testing.assert_close(steps, wanted, **tolerance("sdpa", torch.float32))
