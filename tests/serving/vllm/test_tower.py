"""The tower of transformers as it works inside vLLM, without vLLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pore
from cases import CASES
from pore.engine.embeddings import kept_embeddings
from pore.errors import ModelStateError, UnsupportedModelError
from pore.serving.vllm.tower import PrunedTower, renamed

MODULES = {"LLaVA-1.5": ("vision_tower", "multi_modal_projector"), "Qwen2.5-VL": ("visual",)}
SERVED = [case for case in CASES if case.name in MODULES]
PRUNERS = [
    pore.FasterVLM(keep=6),
    pore.VisionZip(keep=6),
    pore.DivPrune(keep=6),
    pore.SCOPE(keep=6),
    pore.Chain(pore.FasterVLM(keep=9), pore.DivPrune(keep=6)),
]


def inside(case: Any, pruner: Any) -> PrunedTower:
    """The tower with the weights of a case's model."""
    model = case.model()
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)  # as vLLM does while a model is made
    try:
        tower = PrunedTower(model.config, pruner, MODULES[case.name])
    finally:
        torch.set_default_dtype(before)
    for name, module in tower.modules.items():
        module.load_state_dict(getattr(model.model, name).state_dict())
        module.to(model.dtype)
    return tower


@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda pruner: pruner.name)
@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_rows_are_those_of_the_whole_model(case: Any, pruner: Any) -> None:
    model, inputs = case.model(), case.inputs([[5, 6, -1, 7, 8]])
    (expected,) = kept_embeddings(model, inputs, pruner)
    pixels = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
    (found,) = inside(case, pruner).rows(expected.seen, pixels)
    assert found.kept == expected.kept
    assert found.grid == expected.grid
    torch.testing.assert_close(found.embeddings, expected.embeddings, rtol=0, atol=1e-12)


def test_several_images_of_one_size() -> None:
    case = next(case for case in SERVED if case.name == "LLaVA-1.5")
    inputs = case.inputs([[5, -1, 6, -2, 7]])
    expected = kept_embeddings(case.model(), inputs, PRUNERS[0])
    found = inside(case, PRUNERS[0]).rows(
        expected[0].seen, {"pixel_values": inputs["pixel_values"]}
    )
    assert [one.kept for one in found] == [one.kept for one in expected]


def test_a_method_that_reads_the_question_refuses() -> None:
    case = next(case for case in SERVED if case.name == "LLaVA-1.5")
    inputs = case.inputs([[5, -1, 7]])
    seen = len([token for token in case.image_ids(0) if token == case.placeholder])
    with pytest.raises(UnsupportedModelError, match="does not choose by the image alone"):
        inside(case, pore.CDPruner(keep=6)).rows(seen, {"pixel_values": inputs["pixel_values"]})


def test_a_number_that_the_image_size_does_not_tell_is_refused() -> None:
    """A method that keeps more than its `counts` say."""

    class Liar(pore.FasterVLM):
        name = "Liar"

        def counts(self, visual: int, layers: int) -> list[int]:
            return [self.keep - 1] * layers  # type: ignore[list-item]

    pore.Pruner.registry.pop("Liar")
    case = next(case for case in SERVED if case.name == "LLaVA-1.5")
    pixels = {"pixel_values": case.inputs([[5, -1, 7]])["pixel_values"]}
    seen = len([token for token in case.image_ids(0) if token == case.placeholder])
    with pytest.raises(ModelStateError, match="6 tokens are left of an image for which"):
        inside(case, Liar(keep=6)).rows(seen, pixels)


def test_weights_are_renamed() -> None:
    weights = [("a.vision_model.b", torch.zeros(1)), ("c", torch.ones(1))]
    names = [name for name, _ in renamed(weights, {"a.vision_model.": "a."})]
    assert names == ["a.b", "c"]
