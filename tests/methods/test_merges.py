"""What methods say of merging is what their stages do."""

from __future__ import annotations

import pytest

import pore
from pore.data.loading import load_config
from pore.engine.pruner import Pruner
from pore.engine.stages import Stage
from pore.families.registry import shape_of

SHAPE = shape_of(load_config("embedded"))
USUAL = [pruner for kind in pore.methods().values() if (pruner := kind.usual(36, SHAPE))]


@pytest.mark.parametrize("pruner", USUAL, ids=lambda pruner: pruner.name)
def test_a_method_says_that_it_merges(pruner: Pruner) -> None:
    stages = pruner.stages_in(SHAPE.decoder.layers)
    merging = [
        stage.merges or (not isinstance(stage, Stage) and stage.merge is not None)
        for stage in stages
    ]
    assert any(merging) == (pruner.merges is not None)


def test_methods_that_merge_are_drawn_so() -> None:
    said = {pruner.name: pruner.merges for pruner in USUAL if pruner.merges is not None}
    assert said["ToMe"] == said["VisionZip"] == said["Downsample"] == "all"
    assert said["SparseVLM"] == said["PACT"] == "some"
