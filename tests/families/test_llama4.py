"""Llama 4 beyond what every family is asked: prompts and answers longer than its chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pore
from cases.llama4 import Llama4
from helpers.families import KEEP, PROMPTS, check_cached_decode, check_masked_dense

PRUNERS = [
    pore.FastV(keep=KEEP),  # by layer 1, which looks at all
    pore.Random(keep=KEEP),
    pore.GPrune(keep=KEEP),
    pore.PyramidDrop(keep=KEEP, layers=(1, 3)),
    pore.DivPrune(keep=KEEP),
    pore.Chain(pore.DivPrune(keep=8), pore.FastV(keep=KEEP)),
]


class InChunks(Llama4):
    """Two layers look at all, the others as far as a chunk of 20 tokens goes."""

    sizes: dict[str, Any] = {  # noqa: RUF012
        "attention_chunk_size": 20,
        "no_rope_layers": [1, 0, 1, 0, 1, 1],
    }


CASE = InChunks()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompts", ["ragged", "several"])
@pytest.mark.parametrize("pruner", PRUNERS[:3], ids=lambda p: p.name)
def test_chunks_are_those_of_the_full_sequence(pruner: Any, prompts: str, side: str) -> None:
    check_masked_dense(CASE, pruner, PROMPTS[prompts], side)


@pytest.mark.parametrize("prompts", ["ragged", "several"])
@pytest.mark.parametrize("pruner", [pore.FastV(keep=1.0), *PRUNERS], ids=lambda p: p.name)
@pytest.mark.at_once(3)
def test_decoding_into_the_next_chunk(pruner: Any, prompts: str) -> None:
    check_cached_decode(CASE, pruner, PROMPTS[prompts], count=24)


@pytest.mark.parametrize("pruner", [PRUNERS[0], *PRUNERS[2:]], ids=lambda p: p.name)
def test_static_cache(pruner: Any) -> None:
    model, inputs = CASE.model(), CASE.inputs(PROMPTS["ragged"])
    options = {"max_new_tokens": 24, "do_sample": False}
    with torch.no_grad(), pruner(model):
        expected = model.generate(**inputs, **options)
        got = model.generate(**inputs, **options, cache_implementation="static")
    assert torch.equal(got, expected)
