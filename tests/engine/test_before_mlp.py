"""Stages between attention and MLP of a layer, and stages that have nothing to do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import CASES
from cases.base import Case
from helpers.caches import as_argument
from helpers.checkpointing import turn_on
from helpers.families import PROMPTS, forward
from helpers.models import batch, prompt, tiny_llava
from pore._compat.caches import cache_in
from pore._compat.models import before_mlp
from pore.engine.pruner import Pruner
from pore.engine.stages import Selection, Stage, View
from pore.errors import ModelStateError, UnsupportedModelError
from pore.families.registry import family_of

LAYER = 4  # after the layers that add features in Qwen3-VL; the one before has attention


def layers_of(case: Case) -> Any:
    return family_of(case.model()).layers(case.model())


SEQUENTIAL = [case for case in CASES if before_mlp(layers_of(case)[0]) is not None]
OTHERS = [case for case in CASES if case not in SEQUENTIAL]
# Where layers look at earlier keys, tokens cannot get new states.
PLAIN = [case for case in SEQUENTIAL if not family_of(case.model()).shares_keys]


class Own(Pruner):
    """Stages with rules of a test."""

    def __init__(self, *stages: Stage) -> None:
        self.given = stages

    @property
    def name(self) -> str:  # type: ignore[override] # no string, so that it is not registered
        return "Own"

    def stages(self) -> list[Stage]:
        return list(self.given)


def every_second(view: View) -> Selection:
    valid = view.layout.valid
    return Selection(valid & (torch.arange(valid.shape[1]) % 2 == 0))


def all_stay(view: View) -> Selection:
    return Selection(view.layout.valid)


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
@pytest.mark.at_once(99)
def test_a_layer_goes_on_with_the_new_states(case: Case) -> None:
    """A token that gets another's state before the MLP leaves the layer as that one does: the layer
    adds what the MLP makes of the new state to the new state."""
    inputs = case.inputs(PROMPTS["single"])
    places: list[Tensor] = []

    def second_as_first(view: View) -> Selection:
        places.append(view.layout.columns[0, :2])
        features = view.features.clone()
        features[:, 1] = features[:, 0]
        return Selection(view.layout.valid, features)

    seen: list[Tensor] = []

    def look(_: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hook = layers_of(case)[LAYER - 1].register_forward_hook(look)
    try:
        forward(case, inputs)
        with Own(Stage(LAYER, second_as_first, merges=True, before_mlp=True))(case.model()):
            forward(case, inputs)
    finally:
        hook.remove()
    (plain, changed), (place,) = seen, places
    first, second = changed[0, place]
    torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(first, plain[0, place[0]], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(plain[0, place[1]], plain[0, place[0]])


@pytest.mark.parametrize("case", SEQUENTIAL, ids=lambda case: case.name)
@pytest.mark.at_once(5)
def test_dropping_there_is_dropping_after_it(case: Case) -> None:
    """The MLP computes each token by itself."""
    inputs = case.inputs(PROMPTS["several"], "left")
    stage, found = Stage(LAYER, every_second), []
    for one in (stage, replace(stage, before_mlp=True)):
        with Own(one)(case.model()) as run:
            found.append((forward(case, inputs), [sample.tokens for sample in run.report]))
    (expected, counts), (got, same) = found
    assert counts == same
    assert torch.equal(got, expected)


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_where_attention_and_mlp_run_side_by_side_it_is_refused(case: Case) -> None:
    with pytest.raises(UnsupportedModelError, match="run side by side"):
        Own(Stage(LAYER, every_second, before_mlp=True))(case.model()).__enter__()


def test_after_the_last_layer() -> None:
    model, inputs = tiny_llava(layers=3), batch([prompt(3, 1, 5)])
    found = []
    for before in (False, True):
        with torch.no_grad(), Own(Stage(3, every_second, before_mlp=before))(model):
            found.append(model(**inputs).logits)
    assert torch.equal(*found)


def test_gradients_go_through_new_states() -> None:
    model, inputs = tiny_llava(), batch([prompt(3, 1, 5)])

    def halves(view: View) -> Selection:
        return Selection(every_second(view).keep, view.features * 0.5)

    grads = []
    weight = model.model.language_model.layers[0].self_attn.v_proj.weight
    for _ in range(2):
        with Own(Stage(2, halves, merges=True, before_mlp=True))(model):
            out = model(**inputs).logits[0, -1, 5]
            (grad,) = torch.autograd.grad(out, weight)
            grads.append((out.detach(), grad))
            with torch.no_grad():
                weight += 1e-6 * grad
    (before, grad), (after, _) = grads
    torch.testing.assert_close(after - before, 1e-6 * (grad**2).sum(), rtol=1e-3, atol=1e-12)


def test_checkpointed_layers_are_refused() -> None:
    model, inputs = tiny_llava().train(), batch([prompt(3, 1, 5)])
    turn_on(model)
    stage = Stage(2, every_second, before_mlp=True)
    with Own(stage)(model), pytest.raises(ModelStateError, match="gradient checkpointing"):
        model(**inputs)


class TestIdle:
    """A stage that has nothing to do is passed over, as if it kept everything."""

    @pytest.mark.parametrize("before", [False, True])
    @pytest.mark.parametrize("turns", [(2, 4), (4, 2), (3, 3), (2, 9), (9, 3)])
    def test_over_two_turns(self, turns: tuple[int, int], before: bool) -> None:
        """Each turn is pruned by another stage, or by none; then some tokens are decoded."""
        model = tiny_llava(layers=6)
        inputs = [batch([prompt(3, 1, 5), prompt(4, 1, 4)]), batch([prompt(2, 1, 6)] * 2)]
        found = []
        for passes in (False, True):
            now: list[int] = []
            asked: list[int] = []

            def stage(layer: int, now: Any = now, asked: Any = asked, passes: Any = passes) -> Any:
                def rule(view: View) -> Selection:
                    asked.append(layer)
                    return every_second(view) if now[-1] == layer else all_stay(view)

                idle = (lambda _: now[-1] != layer) if passes else None
                return Stage(layer, rule, before_mlp=before, idle=idle)

            with torch.no_grad(), Own(*(stage(i) for i in (2, 3, 4)))(model) as run:
                cache, logits, mask = None, [], torch.zeros(2, 0).long()
                for turn, given in zip(turns, inputs, strict=True):
                    now.append(turn)
                    mask = torch.cat([mask, given["attention_mask"]], 1)
                    out = model(**given | {"attention_mask": mask}, **as_argument(cache))
                    cache = cache_in(out)
                    logits.append(out.logits)
                for token in (7, 8):
                    mask = nn.functional.pad(mask, (0, 1), value=1)
                    ids = torch.full((2, 1), token)
                    out = model(input_ids=ids, attention_mask=mask, **as_argument(cache))
                    logits.append(out.logits)
            assert asked == ([i for i in turns if i < 9] if passes else [2, 3, 4] * 2)
            found.append((logits, [sample.tokens for sample in run.report]))
        (expected, counts), (got, same) = found
        assert counts == same
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

    def test_its_attention_is_not_read(self) -> None:
        model, read = tiny_llava(), []
        stage = Stage(2, all_stay, read.append, idle=lambda _: True)
        with torch.no_grad(), Own(stage)(model) as run:
            model(**batch([prompt(3, 1, 5)]))
        assert read == []
        assert run.report.samples[0].images[0].stages == ()
