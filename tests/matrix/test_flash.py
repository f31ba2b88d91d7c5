"""What FlashAttention is given: transformers guesses packed sequences from positions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration
from transformers.modeling_flash_attention_utils import (
    _is_packed_sequence,
    prepare_fa_kwargs_from_position_ids,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pore
from cases.mistral3 import Ministral3
from helpers.caches import as_argument
from helpers.models import batch, prompt, tiny_llava

NAME = "flash_positions_test"
GIVEN: list[Tensor | None] = []


def _flash(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """FlashAttention without a mask, with what transformers makes of position ids."""
    assert mask is None
    assert module.config._attn_implementation == NAME  # by which transformers loads the kernel
    GIVEN.append(position_ids)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q, n = query.shape[2], key.shape[2]
    seen = torch.ones(q, n, dtype=torch.bool).tril(n - q)
    if _is_packed_sequence(position_ids, query.shape[0]):
        (starts, _), _ = prepare_fa_kwargs_from_position_ids(position_ids)
        seen = torch.zeros(q, n, dtype=torch.bool)
        for a, b in itertools.pairwise(starts):
            seen[a:b, a:b] = torch.ones(b - a, b - a, dtype=torch.bool).tril()
    logits = (query @ key.transpose(2, 3)) * kwargs["scaling"]
    weights = logits.masked_fill(~seen, -1e30).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


@pytest.fixture(scope="module")
def flash() -> LlavaForConditionalGeneration:
    model = tiny_llava(attention="sdpa")
    ALL_ATTENTION_FUNCTIONS.register(NAME, _flash)
    model.model.language_model.config._attn_implementation_internal = NAME
    return model


def test_positions_with_gaps_are_no_packed_sequences(flash: LlavaForConditionalGeneration) -> None:
    """A second question with its own image: what the first left in the cache must be seen."""
    pruner = pore.FastV(keep=5, layer=2)
    logits = []
    for model in (tiny_llava(attention="sdpa"), flash):
        cache = DynamicCache(config=model.config.text_config)
        with torch.inference_mode(), pruner(model) as run:
            for turn in range(2):
                inputs = batch([prompt(3, 1, 5, turn)], seed=turn)
                mask = {"attention_mask": torch.ones(1, cache.get_seq_length() + 24)}
                out = model(**inputs | mask, **as_argument(cache))
        assert [sample.tokens[-1] for sample in run.report] == [13, 13]
        logits.append(out.logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-9, atol=1e-9)


def test_flash_is_not_made_to_ask_the_device_in_every_layer(
    flash: LlavaForConditionalGeneration,
) -> None:
    GIVEN.clear()
    with torch.inference_mode(), pore.FastV(keep=5, layer=2)(flash):
        flash(**batch([prompt(3, 1, 5)]))
    assert [positions is None for positions in GIVEN] == [False, False, True, True, True]


def test_positions_that_the_attention_itself_computes_with_are_left_to_it() -> None:
    """Ministral 3 scales queries by their positions, in both turns and in what is decoded."""
    logits = []
    for name in ("sdpa", NAME):
        case = Ministral3()
        model = case.model()
        model.model.language_model.config._attn_implementation_internal = name
        for pruner in (pore.FastV(keep=5, layer=2), pore.GPrune(keep=5)):
            cache = DynamicCache(config=model.config.text_config)
            with torch.inference_mode(), pruner(model):
                for turn in range(3):
                    inputs = case.inputs([[5, 6, -1, 7, 8] if turn < 2 else [9]])
                    seen = turn * 32
                    inputs["attention_mask"] = torch.ones(1, seen + inputs["input_ids"].shape[1])
                    out = model(**inputs, **as_argument(cache))
                    logits.append(out.logits)
    half = len(logits) // 2
    for got, expected in zip(logits[half:], logits[:half], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
