"""DivPrune: distinct tokens by default, and the authors' repeats on request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPVisionConfig

import pore
from cases import CASES
from helpers.golden_files import Made, draw
from helpers.golden_prompts import embeddings, model_around
from helpers.models import batch, prompt, tiny_llava
from methods import golden_divprune
from pore.errors import BudgetError, InputError, UnsupportedModelError
from pore.families.registry import family_of
from pore.methods.divprune import cosine_distance, farthest

sizes = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(0, 999))


def distances(images: int, tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return cosine_distance(torch.randn(images, tokens, 8, generator=generator).double())


@given(sizes, st.data())
def test_each_pick_is_farthest_from_those_before(size: Any, data: st.DataObject) -> None:
    distance = distances(*size)
    count = data.draw(st.integers(1, size[1]))
    valid = torch.ones(distance.shape[:2], dtype=torch.bool)
    order, rank = farthest(distance, count, valid)
    for one, row, ranks in zip(distance, order.tolist(), rank, strict=True):
        assert len(set(row)) == count
        assert [int(ranks[pick]) for pick in row] == list(range(count))
        for step in range(1, count):
            left = [i for i in range(size[1]) if i not in row[:step]]
            gaps = {i: float(one[row[:step], i].min()) for i in left}
            assert gaps[row[step]] == max(gaps.values())


@given(sizes, st.booleans())
def test_filling_does_not_matter(size: Any, faithful: bool) -> None:
    distance = distances(*size)
    valid = torch.ones(distance.shape[:2], dtype=torch.bool)
    count = max(size[1] // 2, 1)
    order, _ = farthest(distance, count, valid, faithful)
    wide = torch.nn.functional.pad(distance, (0, 2, 0, 2), value=-3.0)
    filled = torch.nn.functional.pad(valid, (0, 2))
    assert torch.equal(farthest(wide, count, filled, faithful)[0], order)


@given(sizes)
def test_an_embedding_of_zeros_is_like_no_other(size: Any) -> None:
    """It has cosine 0 to all, itself included, and is picked like any token as far from others."""
    images, tokens, seed = size
    features = torch.randn(images, tokens, 8, generator=torch.Generator().manual_seed(seed))
    features[:, 0] = 0.0
    distance = cosine_distance(features)
    assert torch.equal(distance[:, 0], torch.ones(images, tokens))
    assert torch.equal(distance[:, :, 0], torch.ones(images, tokens))
    order, _ = farthest(distance, tokens, torch.ones(images, tokens, dtype=torch.bool))
    for row in order.tolist():
        assert sorted(row) == list(range(tokens))


class TestFaithful:
    def duplicates(self) -> Tensor:
        """(1, 16, 8) six different vectors and ten copies of them."""
        vectors = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
        return torch.cat([vectors, vectors[[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]])[None]

    def test_the_authors_pick_duplicates_again(self) -> None:
        distance = cosine_distance(self.duplicates())
        valid = torch.ones(1, 16, dtype=torch.bool)
        theirs = farthest(distance, 12, valid, faithful=True)[0][0].tolist()
        ours = farthest(distance, 12, valid)[0][0].tolist()
        assert len(set(ours)) == 12
        assert len(set(theirs)) < 12
        assert len({i % 6 if i < 12 else i - 12 for i in theirs[:6]}) == 6
        assert [i % 6 if i < 12 else i - 12 for i in theirs[:6]] == [
            i % 6 if i < 12 else i - 12 for i in ours[:6]
        ]

    def test_the_decoder_gets_a_token_as_often_as_it_was_picked(self) -> None:
        model = tiny_llava(dtype=torch.float32)
        text = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
        visual = self.duplicates()
        visual = torch.nn.functional.pad(visual, (0, 24)).expand(2, -1, -1)
        prompts = torch.cat([text[:, :4], visual, text[:, 4:]], 1)
        where = torch.zeros(2, 25, dtype=torch.bool)
        where[:, 4:20] = True
        with torch.no_grad(), pore.DivPrune(keep=12, faithful=True)(model) as run:
            run.mark_visual(where)
            got = model(inputs_embeds=prompts).logits
        (image,) = run.report.samples[0].images
        assert len(image.kept) == 12
        assert len(set(image.kept)) < 12
        assert list(image.kept) == sorted(image.kept)
        short = torch.cat([text[:, :4], visual[:, list(image.kept)], text[:, 4:]], 1)
        with torch.no_grad():
            expected = model(inputs_embeds=short).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

    def test_is_the_default_where_nothing_is_duplicated(self) -> None:
        model, inputs = tiny_llava(), batch([prompt(3, 2, 5), prompt(2, 1, 4, 1)])
        one, first = embeddings(model, pore.DivPrune(keep=5), inputs)
        other, second = embeddings(model, pore.DivPrune(keep=5, faithful=True), inputs)
        assert torch.equal(one, other)
        assert [s.images for s in first.report] == [s.images for s in second.report]

    def test_no_positions_in_the_image(self) -> None:
        case = next(case for case in CASES if case.name == "Qwen2-VL")
        with pytest.raises(UnsupportedModelError, match="faithful=False"):
            pore.DivPrune(keep=5, faithful=True)(case.model()).__enter__()


class TestNewlines:
    """A LLaVA-NeXT image of 16 + 48 visual tokens and 8 newlines."""

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8, initializer_range=0.3,
    )  # fmt: skip

    def tiled(self) -> tuple[Any, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = model_around(self.vision, torch.randn(40, 8), [2, 2])
        inputs = {"image_sizes": torch.tensor([[64, 48], [64, 48]])}
        tilings = family_of(model).tilings(model, inputs)
        image = [model.config.image_token_id] * len(tilings[0].slots)
        ids = torch.tensor([[0, 1, *image, 2, 3], [1, 5, *image, 4, 3]])
        inputs |= {"input_ids": ids, "attention_mask": (ids != 0).long()}
        inputs["pixel_values"] = torch.randn(2, 5, 3, 32, 32)
        dense, _ = embeddings(model, pore.DivPrune(keep=1.0), inputs)
        model.model.image_newline.data = -dense[:, 2:-2].mean((0, 1))  # far from all
        return model, inputs

    def test_they_are_picked_among_visual_tokens_once_it_is_faithful(self) -> None:
        model, inputs = self.tiled()
        dense, _ = embeddings(model, pore.DivPrune(keep=1.0), inputs)
        assert dense.shape[1] == 4 + 72
        got, run = embeddings(model, pore.DivPrune(keep=0.25, faithful=True), inputs)
        assert got.shape[1] == 4 + 18
        for row, sample in enumerate(run.report):
            states = dense[row, 2:-2][None]
            valid = torch.ones(1, 72, dtype=torch.bool)
            order, _ = farthest(cosine_distance(states), 18, valid, faithful=True)
            torch.testing.assert_close(got[row, 2:-2], states[0, order[0].sort().values])
            assert len(sample.images[0].kept) + sample.images[0].extra == 18
            assert sample.images[0].extra >= 1
        plain, run = embeddings(model, pore.DivPrune(keep=16), inputs)
        assert plain.shape[1] == 4 + 16 + 8

    def test_what_cannot_be_put_in_place_is_refused(self) -> None:
        model, inputs = self.tiled()
        with pytest.raises(BudgetError, match="64 visual tokens, which 72 cannot replace"):
            embeddings(model, pore.DivPrune(keep=1.0, faithful=True), inputs)
        chain = pore.Chain(pore.FasterVLM(keep=30), pore.DivPrune(keep=9, faithful=True))
        with pytest.raises(InputError, match="faithful=False in a chain"):
            embeddings(model, chain, inputs)


# -- the checker of golden files, on files made here -----------------------------------------------


@pytest.mark.parametrize("ratio", [0.04, 0.098, 0.5, 1, 1.0])
def test_divprune(ratio: float) -> None:
    features = draw(7, 25, 6)
    unit = features / features.norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    count = round(ratio * 25)
    nearest = distance.sort(0).values[1]
    order = [int(nearest.argmax())]
    while len(order) < count:
        order.append(int(distance[order].min(0).values.argmax()))
    tensors = {
        "features": features,
        "distance": distance,
        "order": torch.tensor(order),
        "sorted": torch.tensor(sorted(order)),
    }
    golden_divprune.check(Made({"ratio": ratio}, tensors))
