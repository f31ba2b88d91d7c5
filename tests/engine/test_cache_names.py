"""A cache by the name that transformers has had for it since 5.24, and by the one before."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import pore
from cases.base import since
from helpers.models import batch, prompt, tiny_llava
from pore.errors import InputError

RENAMED = since("5.24")
NEW, OLD = "cache", "past_key_values"
LEFT = {"FastV": [24, 24, 12], "DivPrune": [12, 12, 12], "VisionZip": [12, 12, 12]}
PRUNERS = [pore.FastV(keep=4, layer=2), pore.DivPrune(keep=4), pore.VisionZip(keep=4)]
CALLS = ["forward", "generate"]


def call(how: str, model: Any, inputs: dict[str, Any], **caches: Any) -> Any:
    """The logits of a forward, or the tokens of `generate`; deprecated names are no error."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        if how == "forward":
            return model(**inputs, **caches).logits
        return model.generate(**inputs, **caches, max_new_tokens=3, do_sample=False)


def lengths(cache: DynamicCache) -> list[int]:
    """Tokens that each layer has cached."""
    return [int(cache.get_seq_length(layer)) for layer in range(3)]


@pytest.fixture
def parts() -> tuple[Any, dict[str, Any], list[DynamicCache]]:
    """A model, a prompt, and two empty caches."""
    model = tiny_llava(layers=3)
    caches = [DynamicCache(config=model.config.text_config) for _ in range(2)]
    return model, batch([prompt(3, 1, 5)]), caches


@pytest.mark.skipif(not RENAMED, reason="this transformers has one name for it")
@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda p: p.name)
def test_both_names_do_the_same(pruner: pore.Pruner, how: str, parts: Any) -> None:
    model, inputs, (new, old) = parts
    with pruner(model) as run:
        got = [call(how, model, inputs, **{NEW: new}), call(how, model, inputs, **{OLD: old})]
    assert torch.equal(*got)
    more = 2 if how == "generate" else 0
    assert lengths(new) == lengths(old) == [n + more for n in LEFT[pruner.name]]
    first, second = run.report.samples
    assert first.images == second.images


@pytest.mark.skipif(not RENAMED, reason="this transformers has one name for it")
@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("order", [(NEW, OLD), (OLD, NEW)], ids=lambda order: order[0])
@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda p: p.name)
def test_of_both_at_once_the_newer_name_counts(
    pruner: pore.Pruner, order: tuple[str, str], how: str, parts: Any
) -> None:
    """As in transformers itself, which says so in a warning."""
    model, inputs, caches = parts
    given = dict(zip(order, caches, strict=True))
    with pruner(model):
        call(how, model, inputs, **given)
    more = 2 if how == "generate" else 0
    assert lengths(given[NEW]) == [n + more for n in LEFT[pruner.name]]
    assert lengths(given[OLD]) == [0, 0, 0]


@pytest.mark.skipif(RENAMED, reason="this transformers knows the newer name")
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda p: p.name)
def test_a_newer_name_than_is_known_is_refused(pruner: pore.Pruner, both: bool, parts: Any) -> None:
    """transformers before 5.24 leaves it unread, and fills a cache of its own."""
    model, inputs, (new, old) = parts
    why = re.escape(f"does not know the argument {NEW}, and would make a cache of its own")
    with pruner(model) as run:
        for one in (model, model.model):
            with pytest.raises(InputError, match=why), torch.no_grad():
                one(**inputs, **{NEW: new}, **({OLD: old} if both else {}))
        call("forward", model, inputs, **{NEW: None, OLD: old})
    assert lengths(old) == LEFT[pruner.name]
    assert len(run.report.samples) == 1


def test_the_names_of_this_transformers_are_used(parts: Any) -> None:
    """What pore and its tests call the cache and gradient checkpointing is not deprecated."""
    from helpers.caches import as_argument
    from helpers.checkpointing import turn_off, turn_on

    model, inputs, (cache, other) = parts
    with warnings.catch_warnings(), torch.no_grad(), pore.FastV(keep=4, layer=2)(model):
        warnings.simplefilter("error", FutureWarning)
        model(**inputs, **as_argument(cache))
        model.generate(**inputs, **as_argument(other), max_new_tokens=2, do_sample=False)
        turn_on(model, use_reentrant=False)
        turn_off(model)
    assert lengths(cache) == LEFT["FastV"]
