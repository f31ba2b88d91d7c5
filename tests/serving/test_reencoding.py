"""The mode "reencode": one model chooses, another answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pore
from helpers.chats import picture
from helpers.checkpoint import save_checkpoint
from helpers.models import IMAGE
from pore.data.loading import load_model
from pore.data.prompts import Prompt
from pore.data.samples import Sample
from pore.errors import ProfileMismatchError, UnsupportedModelError
from pore.families.registry import family_of
from pore.serving.reencoding import Ranker

PROMPTS = [
    Prompt("one", "USER: <image> w6 w7 ASSISTANT:", [picture(1)]),
    Prompt("two", "USER: <image> w8 <image> w9 ASSISTANT:", [picture(2), picture(3)]),
    Prompt("none", "USER: w9 ASSISTANT:", []),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("pruner", [pore.FastV(keep=5, layer=2), pore.VisionZip(keep=5)])
def test_the_first_layers_choose_as_the_whole_model(checkpoint: Path, pruner: Any) -> None:
    ranker = Ranker.load(str(checkpoint), pruner)
    layers = {"FastV": 3, "VisionZip": 1}[pruner.name]
    assert len(family_of(ranker.model).layers(ranker.model)) == layers
    whole = Ranker(*load_model(str(checkpoint)), pruner)
    pairs = zip(ranker.choose(PROMPTS), whole.choose(PROMPTS), strict=True)
    for (one, other), count in zip(pairs, (1, 2, 0), strict=True):
        assert one.ids == other.ids
        assert one.ids.count(IMAGE) == len(one.images) == count
        for image, same in zip(one.images, other.images, strict=True):
            assert image.kept == same.kept
            assert torch.equal(image.embeddings, same.embeddings)
            assert image.embeddings.shape == (5, ranker.width)


def test_a_bias_of_the_whole_model_is_taken_by_its_first_layers(checkpoint: Path) -> None:
    """Not so by a whole model with other weights, nor where the layer differs."""
    model, processor = load_model(str(checkpoint))
    samples = [Sample(str(i), picture(i), "w6 w7") for i in range(6)]
    bias = pore.calibrate(model, processor, samples, layer=2, progress=False).fit("empirical")
    corrected = pore.FastV(keep=5, layer=2, reweight=bias)
    few = Ranker.load(str(checkpoint), corrected).choose(PROMPTS)
    whole = Ranker(model, processor, corrected).choose(PROMPTS)
    assert [i.kept for c in few for i in c.images] == [i.kept for c in whole for i in c.images]
    with pytest.raises(ProfileMismatchError, match="layer"):
        Ranker.load(str(checkpoint), pore.FastV(keep=5, layer=3, reweight=bias)).choose(PROMPTS)
    model.lm_head.weight.data += 1
    pore.identity.forget(model)
    with pytest.raises(ProfileMismatchError, match="weights"):
        Ranker(model, processor, corrected).choose(PROMPTS)


def test_what_cannot_be_sent_is_refused_at_the_start(checkpoint: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="makes new states"):
        Ranker.load(str(checkpoint), pore.SparseVLM(keep=4, layers=(1, 2, 3)))
