"""Qwen-VL beyond what every family is asked: where DeepStack adds, and recurrent layers."""

from __future__ import annotations

import pytest

import pore
from cases import CASES
from helpers.families import KEEP, PROMPTS, check_masked_dense
from pore.errors import UnsupportedModelError

(DEEPSTACK,) = (case for case in CASES if case.name == "Qwen3-VL")
(RECURRENT,) = (case for case in CASES if case.name == "Qwen3.5")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompts", ["ragged", "several", "mixed"])
@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_pruned_between_layers_that_add_features(layer: int, prompts: str, side: str) -> None:
    """Layers 0 to 2 add features to the visual tokens; of the dropped ones they go unused."""
    assert DEEPSTACK.model().config.vision_config.deepstack_visual_indexes == [0, 1, 2]
    check_masked_dense(DEEPSTACK, pore.FastV(KEEP, layer=layer), PROMPTS[prompts], side)


def test_several_stages_between_layers_that_add_features() -> None:
    pruner = pore.Chain(
        pore.DivPrune(keep=8), pore.FastV(keep=7, layer=1), pore.FastV(KEEP, layer=2)
    )
    check_masked_dense(DEEPSTACK, pruner, PROMPTS["ragged"], "left")


@pytest.mark.parametrize(
    ("pruner", "reason"),
    [
        (pore.FastV(KEEP, layer=1), "layer 0, which is recurrent and has none.* are 1, 3, 5"),
        (pore.FastV(KEEP, layer=3), "layer 2, which is recurrent"),
        (pore.Random(KEEP, layer=1), "first layer of this decoder with attention is layer 1"),
    ],
    ids=repr,
)
def test_what_recurrent_layers_cannot_do(pruner: pore.Pruner, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason), pruner(RECURRENT.model()):
        pass
