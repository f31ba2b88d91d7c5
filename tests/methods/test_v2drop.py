"""V2Drop: how far states move, against the states of the model itself."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import pore
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from helpers.recording import Recording
from helpers.reference import dropped_by_stage, masked_from
from pore.cost.named import model_shape
from pore.errors import BudgetError, InputError
from pore.methods.v2drop import variation

LAYERS = 6


def model_of() -> Any:
    return tiny_llava(layers=LAYERS)


def dense_states(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What enters every layer of the unpruned model."""
    with torch.no_grad():
        found: tuple[Tensor, ...] = model(**inputs, output_hidden_states=True).hidden_states
    return found


class TestScores:
    @pytest.mark.parametrize("layer", [1, 3, LAYERS - 1])
    def test_the_states_between_the_layers(self, layer: int) -> None:
        model, inputs = model_of(), batch([prompt(3, 1, 5)])
        states, visual = dense_states(model, inputs), inputs["input_ids"][0] == IMAGE
        moved = (states[layer] - states[layer - 1])[0, visual].norm(dim=-1)
        with torch.no_grad(), pore.V2Drop(5, (layer,))(model) as run:
            model(**inputs)
        expected = sorted(moved.argsort(descending=True)[:5].tolist())
        assert list(run.report.samples[0].images[0].kept) == expected

    def test_one_stage_right_after_another(self) -> None:
        """The second looks at what the first has left, as it entered that layer."""
        model, inputs = model_of(), batch([prompt(3, 1, 5), prompt(2, 2, 4, 1)])
        recording = Recording(pore.V2Drop((9, 4), (2, 3)))
        with torch.no_grad(), recording(model) as run:
            model(**inputs)
        stages = dropped_by_stage(run, inputs["input_ids"] == IMAGE)
        tokens, layers = inputs["attention_mask"].bool(), model.model.language_model.layers
        with torch.no_grad(), masked_from(layers, stages[:1], tokens):
            states = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
        view = recording.seen[1].view
        rows, first = view.layout.rows.tolist(), recording.seen[0]
        for i, row in enumerate(rows):
            columns = first.view.layout.columns[i][first.selection.keep[i]]
            moved = (states[3] - states[2])[row, columns].norm(dim=-1)
            got = variation(view.layout.gather(view.earlier), view.features)[i]
            torch.testing.assert_close(got, moved, rtol=1e-4, atol=1e-5)

    def test_after_a_method_that_drops_in_between(self) -> None:
        """`earlier` follows the tokens that are left."""
        model, inputs = model_of(), batch([prompt(3, 1, 5)])
        stages = [
            *pore.FastV(9, layer=2).stages(),
            *(replace(stage, earlier=1) for stage in pore.V2Drop(4, (3,)).stages()),
        ]
        both: Any = SimpleNamespace(name="Both", stages=lambda: stages, stages_in=lambda _: stages)
        chain = Recording(both)
        with torch.no_grad(), chain(model):
            model(**inputs)
        view = chain.seen[1].view
        assert view.earlier.shape == view.hidden_states.shape
        states = dense_states(model, inputs)
        kept = chain.seen[0].selection.keep[0]
        columns = chain.seen[0].view.layout.columns[0][kept]
        got = view.layout.gather(view.earlier)[0]
        torch.testing.assert_close(got, states[1][0, columns])

    def test_half_precision_is_compared_in_float32(self) -> None:
        before = torch.full((1, 1, 4), 256.0, dtype=torch.bfloat16)
        after = before + torch.tensor([0.0, 2.0, 0.0, 2.0], dtype=torch.bfloat16)
        moved = variation(before, after)
        assert moved.dtype == torch.float32
        assert moved.item() == pytest.approx(8**0.5)


class TestBudget:
    def test_that_of_the_authors(self) -> None:
        method = pore.V2Drop(1)
        assert method.remaining(576) == [288, 144, 1]
        counts = method.counts(576, 32)
        assert sum(counts) / 32 == pytest.approx(202.8, abs=0.05)

    @pytest.mark.parametrize(
        ("keep", "left"),
        [(64, [288, 144, 64]), (192, [288, 192, 192]), (0.5, [288, 288, 288]), (576, [576] * 3)],
    )
    def test_stages_before_leave_no_less(self, keep: Any, left: list[int]) -> None:
        assert pore.V2Drop(keep).remaining(576) == left

    def test_a_number_for_every_stage(self) -> None:
        assert pore.V2Drop((0.5, 20, 3)).remaining(100) == [50, 20, 3]
        with pytest.raises(BudgetError, match="2 numbers for 3 stages"):
            pore.V2Drop((4, 2))
        with pytest.raises(BudgetError, match="rises"):
            pore.V2Drop((2, 4, 1))

    def test_usual_scales_with_the_depth(self) -> None:
        assert pore.V2Drop.usual(64, model_shape("llava-1.5-7b")).layers == (3, 17, 22)
        assert pore.V2Drop.usual(64, model_shape("llava-1.5-13b")).layers == (4, 21, 28)

    @pytest.mark.parametrize("layers", [(), (0,), (3, 2), (2, 2)])
    def test_layers_ascend_from_the_second(self, layers: tuple[int, ...]) -> None:
        with pytest.raises(BudgetError, match="layers"):
            pore.V2Drop(4, layers)

    def test_a_layer_that_the_decoder_lacks(self) -> None:
        with pytest.raises(BudgetError, match=f"decoder of {LAYERS} layers"):  # noqa: SIM117
            with pore.V2Drop(4, (LAYERS + 1,))(model_of()):
                pass


class TestFaithful:
    def test_all_are_pruned_like_the_first(self) -> None:
        model, inputs = model_of(), batch([prompt(3, 1, 5), prompt(9, 1, 4, 1)])
        found = {}
        for faithful in (False, True):
            with torch.no_grad(), pore.V2Drop(5, (2,), faithful)(model) as run:
                model(**inputs)
            found[faithful] = [sample.images[0].kept for sample in run.report]
        assert found[False][0] != found[False][1]
        assert found[True] == [found[False][0]] * 2

    def test_unless_they_cannot(self) -> None:
        model = model_of()
        inputs = batch([prompt(3, 2, 5)])
        chain = pore.Chain(
            pore.Scored(9, lambda states, layout, _: layout.gather(states)[..., 0], layer=1),
            pore.V2Drop(4, (2,), faithful=True),
        )
        with torch.no_grad(), chain(model) as run:
            model(**inputs)
        assert {len(image.kept) for image in run.report.samples[0].images} == {4}
        view = Recording(pore.V2Drop(4, (2,)))
        with torch.no_grad(), view(model):
            model(**inputs)
        seen = view.seen[0].view
        seen.layout.valid[1, N - 1] = False
        with pytest.raises(InputError, match="different numbers"):
            pore.V2Drop(4, (2,), faithful=True).score(0, seen)
