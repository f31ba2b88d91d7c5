"""FlexAttention: masks are functions. Its eager form stands in for the compiled one.

The masks are those that transformers makes and the kernel is torch's own, only not compiled: that
takes minutes and, for a single query on a CPU, fails in torch 2.13 (unpruned too).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from transformers import DynamicCache, masking_utils
from transformers.integrations import flex_attention as integration

import pore
from cases import CASES
from cases.base import Case, since
from helpers.caches import as_argument
from helpers.families import KEEP, KINDS, PROMPTS, refusal, usual
from helpers.methods import ends
from helpers.models import batch, prompt, tiny_llava
from pore._compat.attention import attention_name
from pore.families.registry import family_of

FAMILIES = {"LLaVA-1.5", "Qwen2.5-VL", "Gemma 3", "PaliGemma"}
if since("5.23"):  # on 5.16 it is another model with FlexAttention, unpruned too
    FAMILIES.add("PaliGemma 2")
PAIRS = [
    pytest.param(
        *(case, name),
        id=f"{case.name}-{name}",
        marks=() if name in KINDS else pytest.mark.slow,
    )
    for case in CASES
    for name in sorted({*KINDS, "FitPrune", "SparseVLM+", "TopV", "DART"})
    if case.name in FAMILIES and refusal(case, name) is None
]


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel and the making of masks, not compiled."""

    def kernel(query: Tensor, key: Tensor, value: Tensor, training: Any = 0, **kwargs: Any) -> Any:
        return flex.flex_attention(query, key, value, **kwargs)

    def make(*args: Any, **kwargs: Any) -> Any:
        return flex.create_block_mask(*args, **{**kwargs, "_compile": False})

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", kernel)
    monkeypatch.setattr(masking_utils, "create_block_mask", make)


@contextmanager
def flexible(model: Any) -> Iterator[None]:
    """The decoder with FlexAttention."""
    config = family_of(model).decoder(model).config
    before = attention_name(config)
    config._attn_implementation_internal = "flex_attention"
    try:
        yield
    finally:
        config._attn_implementation_internal = before


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("case", "name"), PAIRS)
@pytest.mark.at_once(1)
@pytest.mark.in_ci(20)
def test_is_as_with_sdpa(case: Case, name: str, side: str) -> None:
    model, pruner = case.model(), usual(name, KEEP, case)
    inputs = case.inputs(PROMPTS["ragged"], side)
    with torch.no_grad(), pruner(model) as run:
        expected = model(**inputs).logits
    with torch.no_grad(), flexible(model), pruner(model) as again:
        got = model(**inputs).logits
    first, second = run.report.samples, again.report.samples
    assert [s.images for s in first] == [s.images for s in second]
    tokens = [s.tokens[-1] for s in first]
    found = (ends(logits, inputs["attention_mask"], tokens) for logits in (got, expected))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=case.close, atol=case.close)


@pytest.mark.parametrize(
    "prompts",
    ["several", *(pytest.param(p, marks=pytest.mark.slow) for p in ("ragged", "without"))],
)
@pytest.mark.parametrize(("case", "name"), PAIRS)
@pytest.mark.slow
@pytest.mark.in_ci(20)
def test_decoding(case: Case, name: str, prompts: str) -> None:
    model, pruner, inputs = case.model(), usual(name, KEEP, case), case.inputs(PROMPTS[prompts])
    settings = {
        "max_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with torch.no_grad(), pruner(model):
        expected = model.generate(**inputs, **settings)
    with torch.no_grad(), flexible(model), pruner(model):
        got = model.generate(**inputs, **settings)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.logits, expected.logits, rtol=case.close, atol=case.close)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in FAMILIES], ids=lambda c: c.name)
def test_keep_all_is_bit_equal(case: Case) -> None:
    model, inputs = case.model(), case.inputs(PROMPTS["ragged"])
    with torch.no_grad(), flexible(model):
        dense = model(**inputs).logits
        with usual("FastV", 1.0, case)(model):
            assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize(
    "pruner", [pore.FastV(keep=5), pore.PyramidDrop(keep=5, layers=(2, 3))], ids=lambda p: p.name
)
@pytest.mark.slow
def test_turns(pruner: Any) -> None:
    """A second image over the same cache, of which the layers hold different parts."""
    model = tiny_llava()
    parts = [batch([prompt(3, 1, 5)]), batch([prompt(2, 1, 4, 1)], seed=1)]

    def talk() -> tuple[Tensor, list[Any]]:
        cache, logits = DynamicCache(config=model.config.text_config), []
        with torch.no_grad(), pruner(model) as run:
            for part in parts:
                ids, pixels = part["input_ids"], part["pixel_values"]
                logits.append(
                    model(input_ids=ids, pixel_values=pixels, **as_argument(cache)).logits
                )
        return torch.cat(logits, 1), [sample.images for sample in run.report]

    expected, kept = talk()
    with flexible(model):
        got, same = talk()
    assert same == kept
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
