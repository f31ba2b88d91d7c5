"""Queries and keys as they are before RoPE turns them, in every family."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

import pore
from cases import CASES, COUSINS
from cases.base import Case
from cases.gemma4 import Gemma4
from helpers.checkpointing import turn_on
from helpers.families import PROMPTS, forward
from helpers.models import batch, prompt, tiny_llava
from pore._compat.caches import cache_argument, cache_in
from pore.changes import Changes
from pore.engine.pruner import Pruner
from pore.engine.readers import LayerAttention
from pore.engine.stages import Selection, Stage, View
from pore.errors import UnsupportedModelError
from pore.families.registry import family_of
from pore.hooks import tap_attention


@dataclass(frozen=True)
class Looking(Pruner):
    """Drops nothing; notes the logits that a layer would have without RoPE."""

    layer: int
    ahead: bool = False
    seen: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:  # type: ignore[override] # so that it is no method of other tests
        return "Looking without RoPE"

    def stages(self) -> list[Stage]:
        return [Stage(self.layer, self.rule, self.read, ahead=self.ahead)]

    def rule(self, view: View) -> Selection:
        return Selection(view.layout.valid)

    def read(self, attention: LayerAttention) -> Tensor:
        every = torch.arange(attention.layout.tokens.shape[1])
        index = every.expand(len(attention.layout.images), -1)
        logits = attention.without_rope.logits(index)
        self.seen.append((attention.layout, logits))
        return attention.layout.valid.double()


@contextmanager
def not_turned(attention: nn.Module) -> Iterator[list[Any]]:
    """The kernel's arguments in forwards where one attention module applies no RoPE at all.

    It calls a function of its model file for that.
    """
    file: Any = sys.modules[type(attention).__module__]
    names = [
        name
        for name in inspect.unwrap(type(attention).forward).__code__.co_names
        if name.startswith("apply_") and "rotary" in name
    ]
    assert names
    run, seen = attention.forward, []

    def alike(x: Any, y: Any = None, *_: Any, **__: Any) -> Any:
        pair = isinstance(y, Tensor) and y.dim() == 4
        return (x, y) if pair else x

    def inside(*args: Any, **kwargs: Any) -> Any:
        with patch.multiple(file, **dict.fromkeys(names, alike)):
            return run(*args, **kwargs)

    with Changes() as changes:
        tap_attention(changes, attention, lambda *given: seen.append(given))
        changes.put(attention, "forward", inside)
        yield seen


def expected(case: Case, layer: int, inputs: dict[str, Tensor]) -> Tensor:
    """(B, H, L, L) logits of a layer that applies no RoPE."""
    family = family_of(case.model())
    attention = family.attention(family.layers(case.model())[layer])
    with not_turned(attention) as seen:
        forward(case, inputs, use_cache=False)
    query, key, _, scaling, softcap, *_ = seen[0]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query @ key.mT * scaling
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def attending(case: Case) -> list[int]:
    """The layers with attention."""
    family = family_of(case.model())
    layers = family.layers(case.model())
    return [i for i, layer in enumerate(layers) if not family.recurrent(layer)]


def compare(case: Case, method: Looking, layer: int, inputs: dict[str, Tensor]) -> None:
    with method(case.model()):
        forward(case, inputs)
    (layout, logits), *more = method.seen
    assert not more
    wanted = expected(case, layer, inputs)[layout.rows]
    seen = logits > -torch.inf
    assert bool(seen[:, :, layout.last[0]].any())
    torch.testing.assert_close(logits[seen], wanted[seen], rtol=case.close, atol=case.close)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in (*CASES, *COUSINS)])
class TestFamilies:
    def test_logits_of_a_layer_that_has_run(self, case: Case) -> None:
        layer = attending(case)[1 if len(attending(case)) > 1 else 0]
        compare(case, Looking(layer + 1), layer, case.inputs(PROMPTS["ragged"]))

    def test_logits_of_a_layer_ahead(self, case: Case) -> None:
        layer = next(i for i in attending(case) if i > attending(case)[0])
        compare(case, Looking(layer, ahead=True), layer, case.inputs(PROMPTS["single"]))

    def test_logits_of_the_first_layer_on_the_embeddings(self, case: Case) -> None:
        if 0 not in attending(case):
            with pytest.raises(UnsupportedModelError, match="recurrent"):
                compare(case, Looking(0, ahead=True), 0, case.inputs(PROMPTS["single"]))
            return
        compare(case, Looking(0, ahead=True), 0, case.inputs(PROMPTS["ragged"]))


def by_hand(model: LlavaForConditionalGeneration, layer: int, states: Tensor) -> Tensor:
    """(B, H, L, L) logits of a LLaMA layer without RoPE, of the states that enter it."""
    block = model.model.language_model.layers[layer]
    states, config = block.input_layernorm(states), model.config.text_config
    query, key = (
        project(states).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        for project in (block.self_attn.q_proj, block.self_attn.k_proj)
    )
    groups = config.num_attention_heads // config.num_key_value_heads
    logits: Tensor = query @ key.repeat_interleave(groups, 1).mT * config.head_dim**-0.5
    return logits


class TestLlava:
    def test_equals_the_definition(self) -> None:
        model, inputs = tiny_llava(), batch([prompt(3, 1, 5)])
        method = Looking(2)
        with torch.no_grad(), method(model):
            states = model(**inputs, output_hidden_states=True).hidden_states
            wanted = by_hand(model, 1, states[1])
        ((_, logits),) = method.seen
        seen = logits > -torch.inf
        assert torch.equal(seen[0, 0], torch.ones_like(seen[0, 0]).tril())
        torch.testing.assert_close(logits[seen], wanted[seen])

    def test_what_is_in_the_cache_is_not_seen(self) -> None:
        model, method = tiny_llava(), Looking(2)
        first, second = batch([prompt(3, 1, 5)]), batch([prompt(2, 1, 4)])
        with torch.no_grad(), method(model):
            cache = cache_in(model(**first))
            mask = torch.ones(1, cache.get_seq_length() + second["input_ids"].shape[1])
            second |= {"attention_mask": mask, **cache_argument(model.forward, cache)}
            states = model(**second, output_hidden_states=True).hidden_states
            wanted = by_hand(model, 1, states[1])
        past = first["input_ids"].shape[1]
        _, logits = method.seen[1]
        assert bool((logits[..., :past] == -torch.inf).all())
        own = logits[..., past:]
        seen = own > -torch.inf
        assert torch.equal(seen[0, 0], torch.ones_like(seen[0, 0]).tril())
        torch.testing.assert_close(own[seen], wanted[seen])

    def test_the_output_stays_and_the_cost_is_told(self) -> None:
        model, inputs = tiny_llava(), batch([prompt(3, 1, 5)])
        with torch.no_grad():
            dense = model(**inputs).logits
            with Looking(2)(model) as run:
                assert torch.equal(model(**inputs).logits, dense)
        (sample,) = run.report
        config, length = model.config.text_config, inputs["input_ids"].shape[1]
        row = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        rows = 2 * length * row * length
        assert sample.cost is not None
        assert sample.cost.probe == rows + 2 * length * config.hidden_size * (row + 2 * keys)

    def test_it_runs_in_the_autocast_around_the_model(self) -> None:
        model = tiny_llava(dtype=torch.float32)
        inputs = batch([prompt(3, 1, 5)], dtype=torch.float32)
        method = Looking(2)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), method(model):
            states = model(**inputs, output_hidden_states=True).hidden_states
            wanted = by_hand(model, 1, states[1])
        ((_, logits),) = method.seen
        seen = logits > -torch.inf
        torch.testing.assert_close(logits[seen], wanted[seen].float(), rtol=0.02, atol=0.02)

    def test_it_goes_with_checkpointing(self) -> None:
        model, inputs = tiny_llava(), batch([prompt(3, 1, 5)])
        states = model(**inputs, output_hidden_states=True).hidden_states[1]
        wanted = by_hand(model, 1, states).detach()
        turn_on(model)
        model.train()
        method = Looking(2)
        with method(model):
            model(**inputs, use_cache=False).logits.sum().backward()
        ((_, logits),) = method.seen  # what is computed again in the backward is not read again
        seen = logits > -torch.inf
        assert not logits.requires_grad
        torch.testing.assert_close(logits[seen], wanted[seen])

    def test_a_chain_reads_each_layer_for_itself(self) -> None:
        model, inputs = tiny_llava(), batch([prompt(3, 1, 5)])
        one, other = Looking(2), Looking(3, ahead=True)
        with torch.no_grad(), pore.Chain(one, other)(model):
            states = model(**inputs, output_hidden_states=True).hidden_states
        for method, layer in ((one, 1), (other, 3)):
            ((_, logits),) = method.seen
            seen = logits > -torch.inf
            torch.testing.assert_close(logits[seen], by_hand(model, layer, states[layer])[seen])


def test_a_layer_that_looks_at_keys_of_an_earlier_one_is_refused() -> None:
    case = next(case for case in CASES if type(case) is Gemma4)
    with Looking(5)(case.model()), pytest.raises(UnsupportedModelError, match="keys of layer 2"):
        forward(case, case.inputs(PROMPTS["single"]))
