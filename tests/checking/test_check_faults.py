"""What a new transformers might change is caught by the check, and refused before a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch

import pore
from cases import CASES, COUSINS
from cases.base import Case
from helpers.patches import (
    Patches,
    cached,
    emptied,
    kernel,
    patched,
    renamed,
    shifted,
    shifted_ids,
    without_masks,
    without_the_model_s_masks,
)
from pore.checking import proofs as checking
from pore.errors import UnsupportedModelError


def case(name: str) -> Case:
    return next(one for one in [*CASES, *COUSINS] if one.name == name)


@pytest.fixture(autouse=True)
def beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformers that is newer than those tested, of which nothing was found yet."""
    monkeypatch.setattr("pore._compat.versions.TESTED", ("5.0.0", "5.15.0"))
    monkeypatch.setattr(checking, "_proofs", checking._Proofs())


# By what it is: what does it, and which invariant must name it.
FAULTS: dict[str, tuple[Callable[[Any], Patches], str]] = {
    "rotary tables by another name": (
        lambda model: renamed(model, "position_embeddings"),
        "FastV (decoder): pruned equals masked dense",
    ),
    "masks by another name": (
        lambda model: renamed(model, "attention_mask"),
        "FastV (decoder): pruned equals masked dense",
    ),
    "no masks for a kernel": (without_masks, "FastV (decoder): batch equals singles"),
    "no masks of the model": (without_the_model_s_masks, "FastV (decoder): batch equals singles"),
    "positions one further": (
        lambda model: shifted(model, lambda _: True),
        "positions are those that pore counts",
    ),
    "the decoder counts from one": (shifted_ids, "positions are those that pore counts"),
    "positions of a prompt one further": (
        lambda model: shifted(model, lambda length: length > 1),
        "FastV (decoder): cached decoding equals a full forward",
    ),
    "positions of a new token one further": (
        lambda model: shifted(model, lambda length: length == 1),
        "FastV (decoder): cached decoding equals a full forward",
    ),
    "a cache that loses": (
        cached(emptied),
        "FastV (decoder): cached decoding equals a full forward",
    ),
    "a cache that turns its tokens round": (
        cached(lambda keys, values: (keys.flip(2), values.flip(2))),
        "FastV (decoder): cached decoding equals a full forward",
    ),
    "a cache that mixes samples up": (
        cached(lambda keys, values: (keys.flip(0), values.flip(0))),
        "FastV (decoder): cached decoding equals a full forward",
    ),
    "a kernel that sees everything": (
        kernel(lambda q, k, v, mask: (q, k, v, None)),
        "FastV (decoder): pruned equals masked dense",
    ),
}


def check_is_refused(model: Any, make: Callable[[Any], Patches], invariant: str | None) -> None:
    """The check fails, names an invariant, and a block is refused with its finding."""
    with patched(make, model):
        found = pore.check(model)
        assert not found.passed
        if invariant is not None:
            assert invariant in [row.name for row in found.failures]
        # The block would find the same again, which test_check.py has it do.
        with (
            patch.object(checking, "_check", lambda model, thorough: found),
            pytest.raises(UnsupportedModelError) as refused,
        ):
            pore.FastV(6)(model).__enter__()
    first = found.failures[0]
    assert f"{first.name}: {first.finding}" in str(refused.value)
    assert "transformers<=5.15.0" in str(refused.value)
    assert f"{len(found.failures)} of {len(found.rows)} do not hold" in found.summary


@pytest.mark.parametrize("name", ["LLaVA-1.5", pytest.param("Qwen2.5-VL", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.at_once(3)
def test_a_changed_transformers_is_caught_and_refused(name: str, fault: str) -> None:
    check_is_refused(case(name).model(), *FAULTS[fault])


@pytest.mark.parametrize("name", ["Gemma 3", "Qwen3.5", "PaliGemma", "Gemma 4", "Llama 4"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.slow
@pytest.mark.in_ci(15)
def test_the_same_in_families_with_more_to_them(name: str, fault: str) -> None:
    check_is_refused(case(name).model(), FAULTS[fault][0], None)


ARGUMENTS = [
    ("LLaVA-1.5", "base", "input_ids"),
    ("LLaVA-1.5", "base", "pixel_values"),
    ("LLaVA-1.5", "base", "attention_mask"),
    ("LLaVA-1.5", "decoder", "inputs_embeds"),
    ("LLaVA-1.5", "decoder", "attention_mask"),
    ("Qwen2.5-VL", "decoder", "position_ids"),
    ("Qwen3-VL", "decoder", "visual_pos_masks"),
    ("Qwen3-VL", "decoder", "deepstack_visual_embeds"),
    ("Gemma 3", "base", "token_type_ids"),
    ("PaliGemma", "base", "token_type_ids"),
    ("Gemma 4", "decoder", "per_layer_inputs"),
    ("Gemma 4", "layer", "per_layer_input"),
    ("Gemma 4", "layer", "shared_kv_states"),
    ("Ministral 3", "layer", "position_ids"),
]


@pytest.mark.parametrize(
    ("name", "where", "argument"),
    [  # one of every family, the others less often
        pytest.param(
            *one, marks=() if one[0] not in [o[0] for o in ARGUMENTS[:i]] else pytest.mark.slow
        )
        for i, one in enumerate(ARGUMENTS)
    ],
)
def test_what_one_family_has_by_another_name(name: str, where: str, argument: str) -> None:
    check_is_refused(case(name).model(), lambda model: renamed(model, argument, where), None)


@pytest.mark.parametrize("name", ["LLaVA-1.5", pytest.param("Gemma 3", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "argument",
    [
        "past_key_values",
        pytest.param("cache", marks=pytest.mark.slow),
        pytest.param("position_ids", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_name_that_is_found_out_is_no_fault(name: str, argument: str) -> None:
    """The check is about what comes out: what pore reads by what it is may be called otherwise."""
    one = case(name)
    model, inputs = one.model(), one.inputs([[5, 6, -1, 7, 8, 9], [5, -2, 7, 8]])
    settings = {"max_new_tokens": 4, "do_sample": False}
    with pore.FastV(6)(model):
        right = model.generate(**inputs, **settings)
    with patched(lambda model: renamed(model, argument), model):
        assert pore.check(model).passed
        with pore.FastV(6)(model):
            assert torch.equal(model.generate(**inputs, **settings), right)
