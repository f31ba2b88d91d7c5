"""CDPruner: the greedy subset, relevance from CLIP and from the prompt, tiles, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

import pore
from helpers.golden_prompts import embeddings, model_around
from helpers.models import IMAGE, PAD, N, batch, prompt, tiny_llava
from pore.errors import BudgetError, InputError, ScoreError, UnsupportedModelError
from pore.families.registry import family_of
from pore.methods.cdpruner import conditional_kernel, greedy_map, rescaled
from pore.tensors.gathering import cosine

BEGIN, END = 62, 63


class Words:
    """A tokenizer of numbers: "5 7" is begin, 5, 7, end."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [BEGIN, *map(int, text.split()), END]}


def clip(width: int = 16, seed: int = 3) -> CLIPModel:
    torch.manual_seed(seed)
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 64}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8, "eos_token_id": 2}
    vision = {"hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    model = CLIPModel._from_config(config, dtype=torch.float64).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def kernels(count: int, m: int, d: int, seed: int) -> Tensor:
    """(J, m, m) conditional kernels of random features."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, m, d, generator=generator, dtype=torch.float64)
    relevance = torch.rand(count, m, generator=generator, dtype=torch.float64) + 0.1
    return conditional_kernel(cosine(features, features), relevance)


problems = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 14), st.integers(0, 999))


class TestGreedyMap:
    @given(problems, st.integers(1, 12))
    def test_picks_distinct_candidates_whatever_the_rank(self, sizes: Any, count: int) -> None:
        kernel = kernels(*sizes)
        count = min(count, kernel.shape[1])
        order = greedy_map(kernel, count, torch.ones(kernel.shape[:2], dtype=torch.bool))
        assert all(len(set(row)) == count for row in order.tolist())

    @given(problems)
    def test_every_pick_adds_most_to_the_determinant(self, sizes: Any) -> None:
        kernel = kernels(sizes[0], sizes[1], 14, sizes[3])  # of full rank
        count = min(5, kernel.shape[1])
        order = greedy_map(kernel, count, torch.ones(kernel.shape[:2], dtype=torch.bool))
        for one, row in zip(kernel, order.tolist(), strict=True):
            for step, pick in enumerate(row):
                gains = {}
                for candidate in set(range(len(one))) - set(row[:step]):
                    chosen = [*row[:step], candidate]
                    gains[candidate] = float(torch.logdet(one[chosen][:, chosen]))
                assert gains[pick] >= max(gains.values()) - 1e-6

    @given(problems)
    def test_scale_and_order_do_not_matter(self, sizes: Any) -> None:
        kernel = kernels(sizes[0], sizes[1], 14, sizes[3])
        m = kernel.shape[1]
        valid, count = torch.ones(len(kernel), m, dtype=torch.bool), max(m // 2, 1)
        order = greedy_map(kernel, count, valid)
        assert torch.equal(greedy_map(kernel * 64, count, valid), order)
        shuffle = torch.randperm(m, generator=torch.Generator().manual_seed(sizes[3]))
        moved = greedy_map(kernel[:, shuffle][:, :, shuffle], count, valid)
        assert torch.equal(shuffle[moved], order)

    @given(problems, st.booleans())
    def test_what_is_not_valid_does_not_matter(self, sizes: Any, faithful: bool) -> None:
        kernel = kernels(sizes[0], sizes[1], 14, sizes[3])
        j, m = kernel.shape[:2]
        wide = torch.full((j, m + 2, m + 2), 9.0, dtype=torch.float64)
        wide[:, :m, :m] = kernel
        valid = torch.arange(m + 2).expand(j, -1) < m
        count = max(m // 2, 1)
        alone = greedy_map(kernel, count, valid[:, :m], faithful)
        assert torch.equal(greedy_map(wide, count, valid, faithful), alone)

    def test_what_adds_nothing_comes_last_by_its_relevance(self) -> None:
        # Of three directions, each four times.
        features = torch.eye(3).repeat(4, 1)[None]
        relevance = torch.linspace(0.1, 1, 12)[None]
        kernel = conditional_kernel(cosine(features, features), relevance)
        order = greedy_map(kernel, 12, torch.ones(1, 12, dtype=torch.bool))
        assert order.tolist() == [list(range(11, -1, -1))]

    def test_the_authors_pick_twice_beyond_the_rank(self) -> None:
        kernel = kernels(1, 30, 6, 0).float()
        valid = torch.ones(1, 30, dtype=torch.bool)
        theirs = greedy_map(kernel, 24, valid, faithful=True)[0].tolist()
        ours = greedy_map(kernel, 24, valid)[0].tolist()
        assert len(set(theirs)) < 24  # where the rounding errors turn negative, NaN follows
        assert len(set(ours)) == 24
        assert theirs[:6] == ours[:6]


@given(st.integers(0, 99))
def test_relevance_is_scaled_over_all_tiles_of_an_image(seed: int) -> None:
    scores = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed))
    valid = torch.ones(3, 7, dtype=torch.bool)
    valid[1, 4:] = False
    images = torch.tensor([0, 0, 1])
    got = rescaled(scores, valid, images)
    both, alone = torch.cat([scores[0], scores[1, :4]]), scores[2]
    for values, found in ((both, torch.cat([got[0], got[1, :4]])), (alone, got[2])):
        spread = values.max() - values.min()
        torch.testing.assert_close(found, (values - values.min() + 1e-6) / spread)
    assert (got[1, 4:] == 0).all()
    assert (rescaled(torch.full_like(scores, 0.3), valid, images)[valid] == 1).all()


class TestPromptRelevance:
    """Without CLIP: how near a visual token lies to the prompt's words."""

    def test_the_first_pick_is_nearest_to_the_text(self) -> None:
        model, inputs = tiny_llava(), batch([prompt(3, 2, 5), prompt(1, 1, 9, 2)])
        states, _ = embeddings(model, pore.CDPruner(keep=N), inputs)
        with torch.no_grad(), pore.CDPruner(keep=1)(model) as run:
            model(**inputs)
        for row, sample in enumerate(run.report):
            ids = inputs["input_ids"][row]
            text = states[row][(ids != IMAGE) & (ids != PAD)]
            visual = states[row][ids == IMAGE].split(N)
            for image, tokens in zip(sample.images, visual, strict=True):
                near = normalize(tokens, dim=-1) @ normalize(text, dim=-1).mean(0)
                assert image.kept == (int(near.argmax()),)

    def test_works_on_embeddings(self) -> None:
        model, inputs = tiny_llava(), batch([prompt(3, 2, 5)])
        states, _ = embeddings(model, pore.CDPruner(keep=N), inputs)
        with torch.no_grad(), pore.CDPruner(keep=5)(model) as run:
            model(**inputs)
            expected = run.report.samples[0].images
            run.mark_visual(inputs["input_ids"] == IMAGE)
            model(inputs_embeds=states)
        assert run.report.samples[1].images == expected


def kept_with(model: Any, relevance: Any, inputs: Any, **kwargs: Any) -> list[list[Any]]:
    """The kept tokens of every image of every prompt."""
    with torch.no_grad(), pore.CDPruner(keep=5, relevance=relevance)(model) as run:
        if kwargs:
            model.generate(**inputs, max_new_tokens=2, do_sample=False, **kwargs)
        else:
            model(**inputs)
    return [[image.kept for image in sample.images] for sample in run.report]


class TestClipRelevance:
    model = tiny_llava()
    clip = clip()
    prompts = (prompt(3, 2, 5), prompt(9, 0, 4, 1), prompt(1, 1, 1, 2))
    inputs = batch(list(prompts))
    questions = ("5 7", "1", "9 8 4")

    def test_it_is_the_negative_cosine_of_patches_and_question(self) -> None:
        relevance = pore.ClipRelevance(self.clip, Words(), self.questions)
        with torch.no_grad(), pore.CDPruner(keep=1, relevance=relevance)(self.model) as run:
            self.model(**self.inputs)
        tower = self.model.model.vision_tower
        with torch.no_grad():
            states = tower(self.inputs["pixel_values"], output_hidden_states=True)
            patches = self.clip.vision_model.post_layernorm(states.hidden_states[-2][:, 1:])
            patches = normalize(self.clip.visual_projection(patches), dim=-1)
        kept = [image.kept[0] for sample in run.report for image in sample.images]
        for number, row in enumerate((0, 0, 2)):
            ids = torch.tensor([Words()(self.questions[row])["input_ids"]])
            with torch.no_grad():
                text = self.clip.text_model(ids).pooler_output
                text = normalize(self.clip.text_projection(text)[0], dim=-1)
            assert kept[number] == int((-patches[number] @ text).argmax())

    def test_batch_equals_singles_and_beams(self) -> None:
        expected = kept_with(
            self.model, pore.ClipRelevance(self.clip, Words(), self.questions), self.inputs
        )
        assert [len(row) for row in expected] == [2, 0, 1]
        first = 0
        for row, ids in enumerate(self.prompts):
            count = ids.count(IMAGE) // N
            one: dict[str, Any] = {"input_ids": torch.tensor([ids])}
            if count:
                one["pixel_values"] = self.inputs["pixel_values"][first : first + count]
            first += count
            alone = pore.ClipRelevance(self.clip, Words(), self.questions[row])
            assert kept_with(self.model, alone, one) == [expected[row]]
        # transformers 5.16 repeats several images of a prompt wrongly for beams.
        pair = batch([prompt(3, 1, 5), self.prompts[2]])
        relevance = pore.ClipRelevance(self.clip, Words(), (self.questions[0], self.questions[2]))
        plain = kept_with(self.model, relevance, pair)
        beams = kept_with(self.model, relevance, pair, num_beams=2)
        assert beams == [plain[0], plain[0], plain[1], plain[1]]

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_questions_can_be_read_off_the_prompts(self, side: str) -> None:
        seen: list[list[int]] = []

        def read(ids: list[int]) -> str:
            seen.append(ids)
            return self.questions[len(ids) % 3]

        inputs = batch(list(self.prompts), side)
        got = kept_with(self.model, pore.ClipRelevance(self.clip, Words(), read), inputs)
        texts = [[i for i in ids if i != IMAGE] for ids in self.prompts]
        assert seen == [texts[0], texts[2]]  # no image, no question
        questions = [self.questions[len(text) % 3] for text in texts]
        listed = pore.ClipRelevance(self.clip, Words(), questions)
        assert got == kept_with(self.model, listed, inputs)

    def test_question_matters(self) -> None:
        one, other = (
            kept_with(self.model, pore.ClipRelevance(self.clip, Words(), q), self.inputs)
            for q in ("5 7", "40 3 3")
        )
        assert one != other

    def test_after_a_method_in_the_tower(self) -> None:
        relevance = pore.ClipRelevance(self.clip, Words(), self.questions)
        chain = pore.Chain(pore.FasterVLM(keep=9), pore.CDPruner(keep=4, relevance=relevance))
        with torch.no_grad(), chain(self.model) as run:
            self.model(**self.inputs)
        with torch.no_grad(), pore.FasterVLM(keep=9)(self.model) as tower:
            self.model(**self.inputs)
        for one, other in zip(run.report, tower.report, strict=True):
            for image, before in zip(one.images, other.images, strict=True):
                assert len(image.kept) == 4
                assert set(image.kept) < set(before.kept)

    def test_a_question_longer_than_the_context_is_cut(self) -> None:
        long = " ".join(map(str, range(1, 16)))
        plain = pore.ClipRelevance(self.clip, Words(), "")
        pieces = [" ".join(map(str, range(i, min(i + 6, 16)))) for i in (1, 7, 13)]
        expected = plain.text(pieces).mean(0)
        torch.testing.assert_close(plain.text([long])[0], expected)
        theirs = pore.ClipRelevance(self.clip, Words(), "", faithful=True)
        assert not torch.allclose(theirs.text([long])[0], expected)
        # Their first piece has no end: CLIP then pools its begin mark, whatever the words.
        begin = self.clip.text_model(torch.tensor([[BEGIN]])).pooler_output
        first = normalize(self.clip.text_projection(begin)[0], dim=-1)
        one = theirs.text([" ".join(map(str, range(1, 8)))])[0]  # 9 tokens: 8 and the end
        last = self.clip.text_model(torch.tensor([[END]])).pooler_output
        last = normalize(self.clip.text_projection(last)[0], dim=-1)
        torch.testing.assert_close(one, (first + last) / 2)
        assert torch.equal(theirs.text(["3 4"]), plain.text(["3 4"]))

    def test_several_questions_at_once_are_those_one_by_one(self) -> None:
        relevance = pore.ClipRelevance(self.clip, Words(), "")
        questions = ["5", "5 7 9 11", " ".join(["3"] * 20)]
        together = relevance.text(questions)
        for question, got in zip(questions, together, strict=True):
            torch.testing.assert_close(got, relevance.text([question])[0])

    def test_bad_input_is_refused(self) -> None:
        with pytest.raises(InputError, match="2 questions for a batch of 3 prompts"):
            kept_with(self.model, pore.ClipRelevance(self.clip, Words(), ["1", "2"]), self.inputs)
        with pytest.raises(UnsupportedModelError, match="16 wide, the CLIP model's 8"):
            kept_with(self.model, pore.ClipRelevance(clip(8), Words(), "1"), self.inputs)
        tower = pore.ClipRelevance(self.clip.vision_model, Words(), "1")
        with pytest.raises(UnsupportedModelError, match="CLIPModel"):
            kept_with(self.model, tower, self.inputs)
        reader = pore.ClipRelevance(self.clip, Words(), lambda _: "1")
        states, _ = embeddings(self.model, pore.CDPruner(keep=N), self.inputs)
        with pore.CDPruner(keep=5, relevance=reader)(self.model) as run:
            run.mark_visual(self.inputs["input_ids"] == IMAGE)
            with pytest.raises(InputError, match="made before"):
                self.model(inputs_embeds=states)

    def test_it_prints_short(self) -> None:
        pruner = pore.CDPruner(keep=5, relevance=pore.ClipRelevance(self.clip, Words(), "what"))
        assert len(repr(pruner)) < 120


class TestTiles:
    """A LLaVA-NeXT with images that do not fill their tiles."""

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8, initializer_range=0.3,
    )  # fmt: skip

    def tiled(self) -> tuple[Any, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = model_around(self.vision, torch.randn(40, 8), [2, 2])
        sizes = torch.tensor([[64, 40], [64, 64]])
        rows = [
            [1, *[model.config.image_token_id] * len(tiling.slots), 2, 3]
            for tiling in family_of(model).tilings(model, {"image_sizes": sizes})
        ]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        pixels = torch.randn(2, 5, 3, 32, 32)
        return model, {
            "input_ids": ids,
            "attention_mask": (ids != 0).long(),
            "pixel_values": pixels,
            "image_sizes": sizes,
        }

    @pytest.mark.parametrize("with_clip", [False, True])
    def test_shares_are_even_and_the_budget_is_met(self, with_clip: bool) -> None:
        model, inputs = self.tiled()
        relevance = pore.ClipRelevance(clip().float(), Words(), "5 7") if with_clip else None
        with torch.no_grad(), pore.CDPruner(keep=23, relevance=relevance)(model) as run:
            model(**inputs)
        tilings = family_of(model).tilings(model, inputs)
        for sample, tiling in zip(run.report, tilings, strict=True):
            (image,) = sample.images
            assert len(image.kept) == 23
            tiles = [tiling.shown[i] // tiling.patches for i in image.kept]
            assert [tiles.count(tile) for tile in range(5)] == [5, 5, 5, 4, 4]
            assert sample.tokens[0] == 3 + 23 + tiling.slots.count(-1)
        with torch.no_grad(), pore.CDPruner(keep=23, relevance=relevance)(model) as alone:
            model(**{name: value[1:] for name, value in inputs.items()})
        assert alone.report.samples[0].images == run.report.samples[1].images

    def test_the_authors_choose_among_padding_too(self) -> None:
        model, inputs = self.tiled()
        relevance = pore.ClipRelevance(clip().float(), Words(), "5 7")
        with torch.no_grad(), pore.CDPruner(30, relevance, faithful=True)(model) as run:
            model(**inputs)
        padded, full = (sample.images[0] for sample in run.report)
        assert len(padded.kept) < 30
        assert len(full.kept) == 30
        with torch.no_grad(), pore.CDPruner(30, relevance)(model) as run:
            model(**inputs)
        exact = [sample.images[0] for sample in run.report]
        assert len(exact[0].kept) == 30
        assert exact[1] == full  # without padding they are one

    def test_the_authors_way_needs_every_patch(self) -> None:
        model, inputs = self.tiled()
        chain = pore.Chain(pore.FasterVLM(keep=40), pore.CDPruner(keep=20, faithful=True))
        with torch.no_grad(), chain(model), pytest.raises(InputError, match="faithful=False"):
            model(**inputs)


def test_overflow_is_an_error() -> None:
    model = tiny_llava()
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias.fill_(float("inf"))
    with pore.CDPruner(keep=5)(model), pytest.raises(ScoreError, match="NaN"):
        model(**batch([prompt(3, 1, 5)]))


def test_more_than_is_left_is_refused() -> None:
    model = tiny_llava()
    chain = pore.Chain(pore.DivPrune(keep=4), pore.CDPruner(keep=5))
    with torch.no_grad(), chain(model), pytest.raises(BudgetError, match="4 are left"):
        model(**batch([prompt(3, 1, 5)]))
