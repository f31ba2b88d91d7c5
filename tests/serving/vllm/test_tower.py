"""The tower of transformers as it works inside vLLM, without vLLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pore
from cases import CASES
from pore.engine.embeddings import kept_embeddings
from pore.errors import ModelStateError, UnsupportedModelError
from pore.serving.vllm.tiles import TiledCounts
from pore.serving.vllm.tower import PrunedTower, renamed

_LLAVA = ("vision_tower", "multi_modal_projector")
MODULES = {
    "LLaVA-1.5": _LLAVA,
    "LLaVA-NeXT": (*_LLAVA, "image_newline"),
    "Qwen2.5-VL": ("visual",),
    "Qwen3-VL": ("visual",),
}
SERVED = [case for case in CASES if case.name in MODULES]
PRUNERS = [
    pore.FasterVLM(keep=6),
    pore.VisionZip(keep=6),
    pore.DivPrune(keep=6),
    pore.SCOPE(keep=6),
    pore.Chain(pore.FasterVLM(keep=9), pore.DivPrune(keep=6)),
]

PAIRS = [
    (case, pruner)
    for case in SERVED
    for pruner in PRUNERS
    if not (case.deepstack and pruner.name == "VisionZip")  # it merges, and is refused
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
        if isinstance(module, torch.nn.Parameter):
            module.data = getattr(model.model, name).data
        else:
            module.load_state_dict(getattr(model.model, name).state_dict())
            module.to(model.dtype)
    return tower


def placeholders(case: Any, image: int) -> int:
    """How many an image has where nothing is pruned."""
    return case.image_ids(image).count(case.placeholder)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("case", "pruner"), PAIRS, ids=lambda one: one.name)
def test_rows_are_those_of_the_whole_model(case: Any, pruner: Any) -> None:
    model, inputs = case.model(), case.inputs([[5, 6, -1, 7, 8]])
    (expected,) = kept_embeddings(model, inputs, pruner)
    pixels = {k: v for k, v in inputs.items() if k[:5] in ("pixel", "image")}
    (found,) = inside(case, pruner).rows(placeholders(case, 0), len(expected.kept), pixels)
    assert found.kept == expected.kept
    assert found.grid == expected.grid
    torch.testing.assert_close(found.embeddings, expected.embeddings, rtol=0, atol=1e-12)
    for one, other in zip(found.added, expected.added, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


TILED = [
    *PRUNERS,
    pore.VisionZip(keep=0.3),
    pore.VisionZip(keep=1.0),
    pore.DivPrune(keep=20, faithful=True),
    pore.FasterVLM(keep=0.37),
    pore.HiRED(keep=0.4),
]


@pytest.mark.parametrize("pruner", TILED, ids=repr)
def test_a_tiny_tower_tells_how_many_tokens_of_tiles_are_left(pruner: Any) -> None:
    """Of images whose padding is cut off, with the ends of rows or without."""
    case = next(case for case in SERVED if case.name == "LLaVA-NeXT")
    model = case.model()
    asked = TiledCounts(model.config, pruner, MODULES[case.name])
    for image in (0, 1):
        inputs = case.inputs([[5, -1 - image, 7]])
        (expected,) = kept_embeddings(model, inputs, pruner)
        height, width = inputs["image_sizes"][0].tolist()
        assert len(asked.tiling(height, width).slots) == placeholders(case, image)
        assert asked.left(height, width) == len(expected.kept)


def test_several_images_of_one_size() -> None:
    case = next(case for case in SERVED if case.name == "LLaVA-1.5")
    inputs = case.inputs([[5, -1, 6, -2, 7]])
    expected = kept_embeddings(case.model(), inputs, PRUNERS[0])
    found = inside(case, PRUNERS[0]).rows(
        expected[0].seen, 6, {"pixel_values": inputs["pixel_values"]}
    )
    assert [one.kept for one in found] == [one.kept for one in expected]


def test_a_method_that_reads_the_question_refuses() -> None:
    case = next(case for case in SERVED if case.name == "LLaVA-1.5")
    inputs = case.inputs([[5, -1, 7]])
    seen = placeholders(case, 0)
    with pytest.raises(UnsupportedModelError, match="does not choose by the image alone"):
        inside(case, pore.CDPruner(keep=6)).rows(seen, 6, {"pixel_values": inputs["pixel_values"]})


def test_another_number_than_the_prompt_has_is_refused() -> None:
    case = next(case for case in SERVED if case.name == "LLaVA-1.5")
    pixels = {"pixel_values": case.inputs([[5, -1, 7]])["pixel_values"]}
    with pytest.raises(ModelStateError, match="6 tokens are left of an image for which"):
        inside(case, PRUNERS[0]).rows(placeholders(case, 0), 5, pixels)


def test_weights_are_renamed() -> None:
    weights = [("a.vision_model.b", torch.zeros(1)), ("c", torch.ones(1))]
    names = [name for name, _ in renamed(weights, {"a.vision_model.": "a."})]
    assert names == ["a.b", "c"]
