"""Every argument of every decoder and layer is known by name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from torch import nn

import pore
from cases import CASES, COUSINS
from cases.base import Case
from helpers.models import tiny_llava
from pore._compat.arguments import DECODER, LAYER
from pore.errors import UnsupportedModelError
from pore.families.registry import family_of

EVERYONE = [*CASES, *COUSINS]


@pytest.mark.parametrize("case", EVERYONE, ids=lambda case: case.name)
def test_every_argument_of_decoders_and_layers_is_known(case: Case) -> None:
    """One that is new, or has a new name, is to be looked at: is there one for every token?"""
    model = case.model()
    family = family_of(model)

    def arguments(module: nn.Module) -> set[str]:
        return set(inspect.signature(type(module).forward).parameters) - {"self", "kwargs"}

    assert arguments(family.decoder(model)) <= DECODER
    for layer in family.layers(model):
        assert arguments(layer) <= LAYER
        assert set(family.token_inputs) <= arguments(layer) | arguments(family.decoder(model))


@pytest.mark.parametrize("name", ["cache", "past_key_values", "attention_mask", "position_ids"])
@pytest.mark.parametrize("which", ["decoder", "layer"])
def test_a_renamed_argument_is_refused(
    which: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llava()
    decoder = model.model.language_model
    module = decoder if which == "decoder" else decoder.layers[0]
    signature = inspect.signature(type(module).forward)
    if name not in signature.parameters:
        pytest.skip("another version of transformers calls it so")
    other = [
        one.replace(name="renamed" if one.name == name else one.name)
        for one in signature.parameters.values()
        if not (one.name == "position_embeddings" and name == "position_ids")
    ]
    forward = type(module).forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    changed.__signature__ = signature.replace(parameters=other)  # type: ignore[attr-defined]
    kind = type(module.__class__.__name__, (type(module),), {"forward": changed})
    monkeypatch.setattr(module, "__class__", kind)
    refused = pytest.raises(UnsupportedModelError, match="a name that this version of pore knows")
    with refused, pore.FastV(keep=4)(model):
        pass
