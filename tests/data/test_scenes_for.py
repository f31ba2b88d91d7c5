"""Which embedded scenes a model is given by default."""

from __future__ import annotations

import pytest

from helpers.models import tiny_llava
from pore.data.sources import load_samples, scenes_for
from processors import KINDS
from processors.base import Kind, parts_or_skip

ONE_SIZE = {"Gemma 3", "Gemma 3, pan and scan", "LLaVA-1.5", "LLaVA-1.5, letterboxed"}
ONE_SIZE |= {"LLaVA with SigLIP", "PaliGemma", "Video-LLaVA"}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_models_of_any_size_get_mixed_sizes(kind: Kind) -> None:
    _, model = parts_or_skip(kind)
    expected = "embedded:test" if kind.name in ONE_SIZE else "embedded:test:mixed"
    assert scenes_for(model, "test") == expected


def test_what_it_names_can_be_loaded() -> None:
    name = scenes_for(tiny_llava(), "calibration")
    assert name == "embedded:calibration"
    assert len(list(load_samples(name, limit=2))) == 2
