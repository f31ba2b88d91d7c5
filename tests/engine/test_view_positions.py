"""What a rule is told of positions and values: those that the layers and kernels get."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pore
from cases import CASES
from cases.base import Case
from helpers.families import PROMPTS, forward
from helpers.recording import Recording
from pore.engine.pruner import Pruner
from pore.engine.readers import LayerAttention
from pore.engine.stages import Stage
from pore.families.registry import family_of

LAYER = 2


def turns(tables: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines, of rotary tables as pairs or as complex numbers."""
    return (tables.real, tables.imag) if isinstance(tables, Tensor) else tables


class Reading(Pruner):
    """A method whose one stage hands its rule the values of the layer before."""

    def __init__(self, method: Pruner) -> None:
        self.method = method

    @property
    def name(self) -> str:  # type: ignore[override] # no string, so that it is not registered
        return self.method.name

    def stages(self) -> list[Any]:
        def read(attention: LayerAttention) -> Tensor | None:
            return attention.value

        last = self.method.stages()[-1]
        assert isinstance(last, Stage)
        return [*self.method.stages()[:-1], replace(last, attention=read)]


@pytest.mark.parametrize("chained", [False, True], ids=["alone", "after another"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_positions_make_the_tables_that_the_layer_gets(case: Case, chained: bool) -> None:
    model, inputs = case.model(), case.inputs(PROMPTS["ragged"])
    layers = family_of(model).layers(model)
    pruner: Pruner = pore.Random(6, layer=LAYER)
    if chained and not family_of(model).recurrent(layers[0]):
        pruner = pore.Chain(pore.Random(9, layer=LAYER - 1), pruner)
    given: list[Any] = []

    def look(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        given.append(kwargs["position_embeddings"])

    recording = Recording(pruner)
    with recording(model):
        # After the engine's own hook, so that it sees what that makes of the arguments.
        hook = layers[LAYER - 1].register_forward_pre_hook(look, with_kwargs=True)
        forward(case, inputs)
        hook.remove()
    view = recording.seen[-1].view
    positions = view.positions
    assert positions.shape[1:] == view.layout.tokens.shape
    expected = turns(given[-1])
    if len(positions) == 1:
        got = turns(view.rotary(view.hidden_states, positions[0]))
    else:  # on several axes the model's own tables mix them
        got = turns(family_of(model).rotary(model, view.hidden_states, positions, LAYER - 1))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.expand_as(other), other)


def test_values_are_those_of_the_layer() -> None:
    case = next(case for case in CASES if case.name == "LLaVA-1.5")
    model, inputs = case.model(), case.inputs(PROMPTS["ragged"])
    layer: Any = family_of(model).layers(model)[LAYER - 1]
    seen: list[Tensor] = []
    hook = layer.self_attn.v_proj.register_forward_hook(lambda _, __, out: seen.append(out))
    recording = Recording(Reading(pore.Random(6, layer=LAYER)))
    with recording(model):
        forward(case, inputs)
    hook.remove()
    value = recording.seen[-1].view.attention
    batch, heads, length, size = value.shape
    expected = seen[0].view(batch, length, heads, size).transpose(1, 2)
    assert torch.equal(value, expected)
