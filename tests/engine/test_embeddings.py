"""What a method keeps, as embeddings for a decoder that has never seen the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pore
from cases import CASES
from helpers.models import N, batch, prompt, tiny_llava
from pore._compat.models import of_layers
from pore.engine.embeddings import KeptEmbeddings, kept_embeddings, last_layer
from pore.engine.run import unpruned
from pore.errors import BudgetError, UnsupportedModelError
from pore.families.registry import family_of
from pore.serving.reencoding import reencoded

BEFORE = [
    pore.VisionZip(keep=6),
    pore.FasterVLM(keep=6),
    pore.DivPrune(keep=6),
    pore.Chain(pore.FasterVLM(keep=9), pore.DivPrune(keep=6)),
]
INSIDE = [
    pore.FastV(keep=5, layer=2),
    pore.PyramidDrop(keep=4, layers=(1, 2, 3)),
    pore.Chain(pore.FasterVLM(keep=9), pore.FastV(keep=5, layer=2)),
    pore.V2Drop(keep=5, layers=(2, 3)),
]
TILED = [case for case in CASES if case.name in ("LLaVA-1.5", "LLaVA-NeXT", "InternVL")]
PROMPTS = [prompt(3, 1, 5), prompt(2, 2, 4, 1), [5, 6, 7]]


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs).logits[:, -1]


@pytest.mark.parametrize("pruner", BEFORE, ids=lambda pruner: pruner.name)
@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_what_is_kept_before_the_decoder_gives_the_same_answer(case: Any, pruner: Any) -> None:
    """A decoder that gets the embeddings answers as the pruned model does."""
    model = case.model()
    inputs = case.inputs([[5, -1, 7, 8], [5, 6, 10, -2, 7, 8, 9, 11]])
    with pruner(model):
        expected = logits(model, **inputs)
    kept = kept_embeddings(model, inputs, pruner)
    close = 1e-9 if case.name.startswith("LLaVA") else case.close
    found = logits(model, **reencoded(model, inputs, kept))
    torch.testing.assert_close(found, expected, rtol=0, atol=close)


@pytest.mark.parametrize("pruner", INSIDE, ids=lambda pruner: pruner.name)
def test_a_method_in_the_decoder_keeps_what_it_keeps_there(pruner: Any) -> None:
    """Also where the layers after its last stage are missing."""
    model, inputs = tiny_llava(), batch(PROMPTS)
    with torch.inference_mode(), pruner(model) as run:
        model(**inputs)
    images = [image for sample in run.report for image in sample.images]
    kept = kept_embeddings(model, inputs, pruner)
    assert [(k.row, k.index, k.seen) for k in kept] == [(0, 0, N), (1, 0, N), (1, 1, N)]
    assert [k.kept for k in kept] == [image.kept for image in images]
    unpruned(model)  # raises if a hook of it is left
    few = type(model)._from_config(of_layers(model.config, last_layer(pruner) + 1))
    few.load_state_dict(model.state_dict(), strict=False)
    few = few.to(torch.float32)
    expected = kept_embeddings(model.to(torch.float32), batch(PROMPTS, dtype=torch.float32), pruner)
    again = kept_embeddings(few.eval(), batch(PROMPTS, dtype=torch.float32), pruner)
    assert len(family_of(few).layers(few)) == last_layer(pruner) + 1
    assert [k.kept for k in again] == [k.kept for k in expected]


def test_embeddings_are_those_of_the_tokens_that_stay() -> None:
    model, inputs = tiny_llava(), batch(PROMPTS)
    with torch.inference_mode():
        features = model.model.get_image_features(pixel_values=inputs["pixel_values"])
    whole = torch.stack(list(features.pooler_output))
    kept = kept_embeddings(model, inputs, pore.FastV(keep=5))
    for image, one in zip(whole, kept, strict=True):
        assert torch.equal(one.embeddings, image[list(one.kept)])
        assert one.grid == (4, 4)


@pytest.mark.parametrize("pruner", [BEFORE[1], BEFORE[2], INSIDE[0]], ids=lambda p: p.name)
def test_features_that_layers_add_are_those_of_the_tokens_that_stay(pruner: Any) -> None:
    case = next(case for case in CASES if case.name == "Qwen3-VL")
    model, inputs = case.model(), case.inputs([[5, -1, 7, 8], [5, 6, -2, 7, -1, 9]])
    with torch.inference_mode():
        features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    kept = kept_embeddings(model, inputs, pruner)
    assert len(kept) == 3
    assert any(list(one.kept) != list(range(len(one.kept))) for one in kept)
    first = 0
    for one in kept:
        assert len(one.added) == len(features.deepstack_features) == 3
        for found, whole in zip(one.added, features.deepstack_features, strict=True):
            # Of all images in one tensor, or one for each, as transformers has it.
            rows = whole if isinstance(whole, torch.Tensor) else torch.cat(list(whole))
            expected = rows[first : first + one.seen][list(one.kept)]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        first += one.seen
    unpruned(model)


def test_keeping_all_is_the_unpruned_model() -> None:
    model, inputs = tiny_llava(), batch(PROMPTS)
    kept = kept_embeddings(model, inputs, pore.FastV(keep=N))
    again = reencoded(model, inputs, kept)
    assert torch.equal(again["attention_mask"], inputs["attention_mask"])
    torch.testing.assert_close(logits(model, **again), logits(model, **inputs), rtol=0, atol=1e-12)


def test_a_prompt_without_images() -> None:
    model, inputs = tiny_llava(), batch([[5, 6, 7]])
    assert kept_embeddings(model, inputs, pore.FastV(keep=5)) == []


def test_what_is_no_choice_among_embeddings_is_refused() -> None:
    model, inputs = tiny_llava(), batch(PROMPTS[:1])
    with pytest.raises(UnsupportedModelError, match="makes new states"):
        kept_embeddings(model, inputs, pore.SparseVLM(keep=4, layers=(1, 2, 3)))
    with pytest.raises(UnsupportedModelError, match="also drops text"):
        kept_embeddings(model, inputs, pore.FastV(keep=3, faithful=True))
    with pytest.raises(BudgetError, match="Image 0 of sample 0"):
        kept_embeddings(model, inputs, pore.FastV(keep=N + 1))
    unpruned(model)


def test_embeddings_of_other_inputs_are_refused() -> None:
    model, inputs = tiny_llava(), batch(PROMPTS)
    kept: list[KeptEmbeddings] = kept_embeddings(model, inputs, pore.FastV(keep=5))
    with pytest.raises(pore.PoreError, match="2 images were kept of other inputs"):
        reencoded(model, inputs, kept[1:])
