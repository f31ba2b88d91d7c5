"""SparseVLM: raters, budgets with merged tokens, and the engine under both versions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pore
from cases import CASES
from helpers.methods import ends
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from helpers.recording import decoded_and_whole
from helpers.reference import dropped_by_stage, masked_from
from helpers.sparsevlm import (
    KINDS,
    LAYERS,
    PROMPTS,
    P,
    Spy,
    features,
    lengths,
    pruner,
    raters,
    seeds,
    seen,
)
from pore.errors import BudgetError, ProfileMismatchError, ScoreError, UnsupportedModelError
from pore.methods._sparsevlm import (
    clusters,
    rate,
    split,
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava(layers=6)


class TestBudgets:
    def test_authors_numbers(self) -> None:
        """Tokens after the stages, and what enters the layers on average."""
        for version, rows in {
            1: {192: 206.5, 128: 145.4, 96: 114.1, 64: 82.3},
            2: {192: 206.8, 128: 144.1, 96: 113.9, 64: 81.8},
        }.items():
            for tokens, average in rows.items():
                counts = KINDS[version].published(tokens).counts(576, 32)
                assert sum(counts) / 32 == pytest.approx(average, abs=0.06)
        after = [(309, 204, 113), (312, 117, 39), (249, 55, 27), (82, 32, 18)]
        for tokens, expected in zip((192, 128, 96, 64), after, strict=True):
            counts = pore.SparseVLM.published(tokens).counts(576, 32)
            assert tuple(counts[layer] for layer in (3, 7, 16)) == expected
            assert counts[2] == 576

    def test_published_rows_take_other_settings(self) -> None:
        made = pore.SparseVLMPlus.published(192, layers=(2, 5, 11), heads=8)
        assert made == pore.SparseVLMPlus((300, 200, 118), (2, 5, 11), heads=8)
        with pytest.raises(BudgetError, match="192, 128, 96, 64"):
            pore.SparseVLM.published(576)

    @given(st.integers(1, 2000), st.data())
    def test_split_meets_the_total(self, available: int, data: Any) -> None:
        total = data.draw(st.integers(1, available))
        kept, merged = split(total, available)
        assert kept + merged == total
        assert kept >= 1
        assert merged <= clusters(available - kept)
        if merged < clusters(available - kept):  # one kept token would leave too many
            assert kept == 1
        elif kept < available:
            assert kept + 1 + clusters(available - kept - 1) > total

    @given(st.integers(1, 700), st.integers(1, 4), st.booleans(), st.data())
    def test_number_is_met_at_the_end(
        self, available: int, stages: int, second: bool, data: Any
    ) -> None:
        keep = data.draw(st.integers(1, available))
        made = KINDS[1 + second](keep, tuple(range(1, stages + 1)))
        counts = made.counts(available, stages + 1)
        assert counts[-1] == keep
        assert counts == sorted(counts, reverse=True)
        assert pore.SparseVLM(1.0, (1, 2)).counts(available, 4) == [available] * 4

    def test_tuples(self) -> None:
        made = pore.SparseVLMPlus((0.5, 4), (1, 3))
        assert made.counts(16, 5) == [16, 8, 8, 4, 4]
        full = pore.SparseVLMPlus((16, 16), (1, 3))
        assert full.counts(16, 5) == [16] * 5
        one_less = pore.SparseVLMPlus((16, 16), (1, 3), faithful=True)
        assert one_less.counts(16, 5) == [16, 15, 15, 14, 14]
        # The one that the authors' first version drops is merged with itself.
        assert pore.SparseVLM((16, 20), (1, 3), faithful=True).counts(16, 5) == [16] * 5
        with pytest.raises(
            BudgetError, match="Stage 2 should keep 9 visual tokens, but only 8 are"
        ):
            pore.SparseVLMPlus((8, 9), (1, 3)).counts(16, 5)

    @pytest.mark.parametrize(
        ("settings", "error", "words"),
        [
            ({"keep": 0}, BudgetError, "at least 1"),
            ({"keep": (4, 3)}, BudgetError, "2 numbers for 3 stages"),
            ({"keep": (4, 3, 2.0)}, BudgetError, "not a fraction"),
            ({"layers": (2, 2, 3)}, BudgetError, "first pruned layer of each stage"),
            ({"version": 2, "heads": 0}, ScoreError, "at least 1"),
            ({"index": "raster"}, ScoreError, "'original' or 'dense'"),
            ({"reweight": (P, P)}, ProfileMismatchError, "2 corrections for 3 stages"),
        ],
    )
    def test_bad_settings(self, settings: Any, error: Any, words: str) -> None:
        with pytest.raises(error, match=words):
            pruner(**settings)

    @pytest.mark.parametrize("scale", [0.0, -1.0, 1.5, float("nan")])
    def test_bad_scale(self, scale: float) -> None:
        with pytest.raises(BudgetError, match="scale of a RankBudget"):
            pore.RankBudget(scale)

    def test_lists_as_json_gives_them(self) -> None:
        assert pruner(keep=[9, 6, 4], layers=[1, 2, 4]) == pruner(keep=(9, 6, 4))


class TestRaters:
    @given(seeds, st.permutations(range(7)))
    def test_move_with_the_words(self, seed: int, order: list[int]) -> None:
        image, text = features(seed, 1, 5, 4), features(seed + 1, 1, 7, 4)
        every = [torch.ones(1, n, dtype=torch.bool) for n in (5, 7)]
        chosen = rate(image, every[0], text, every[1])
        assert torch.equal(rate(image, every[0], text[:, order], every[1]), chosen[:, order])
        assert torch.equal(rate(image.flip(1), every[0], text, every[1]), chosen)

    @given(seeds, st.integers(1, 5), st.integers(1, 7))
    def test_what_is_not_valid_does_not_matter(self, seed: int, t: int, words: int) -> None:
        image, text = features(seed, 2, 5, 4), features(seed + 1, 2, 7, 4)
        valid = torch.arange(5) < torch.tensor([[5], [t]])
        here = torch.arange(7) < torch.tensor([[7], [words]])
        image[~valid], text[~here] = 1e6, 1e6
        chosen = rate(image, valid, text, here)
        assert not (chosen & ~here).any()
        alone = rate(image[1:, :t], valid[1:, :t], text[1:, :words], here[1:, :words])
        assert torch.equal(chosen[1:, :words], alone)

    def test_a_single_word_rates(self, model: Any) -> None:
        """One word is not above the average of one, but it is all there is."""
        made = Spy(4, LAYERS)
        raters.clear()
        with made(model):
            model(**batch([prompt(3, 1, 1)]))
        assert raters[0].index.tolist() == [[3 + N]]
        assert raters[0].valid.all()

    def test_are_found_in_every_image_and_layout(self, model: Any) -> None:
        """By hand from the embeddings, for two images in a prompt and a padded one."""
        raters.clear()
        inputs = batch(PROMPTS)
        with torch.no_grad(), Spy(4, LAYERS)(model):
            model(**inputs)
        (found,) = raters
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        visual = inputs["input_ids"] == IMAGE
        embeds[visual] = torch.cat(
            list(model.get_image_features(inputs["pixel_values"]).pooler_output)
        )
        number = 0
        for row in (0, 2):
            columns = visual[row].nonzero().flatten()
            for own in columns.split(N):
                text = ~visual[row]
                text[: own[-1] + 1] = False
                words = text.nonzero().flatten()
                weights = (embeds[row, own] @ embeds[row, words].T).softmax(-1).mean(0)
                expected = words[weights > weights.mean()] if len(words) > 1 else words
                got = found.index[number][found.valid[number]]
                assert torch.equal(got, expected)
                number += 1
        assert number == 3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "settings",
    [
        {"version": 2},
        {"version": 2, "reweight": P},
        {"version": 2, "heads": 2, "faithful": True},
        {"reweight": P},
        {"keep": (9, 6, 3)},
        {"keep": pore.RankBudget(0.6)},
    ],
    ids=["v2", "v2 reweighted", "v2 heads", "v1 reweighted", "v1 tuple", "v1 rank"],
)
def test_batch_equals_its_samples(model: Any, settings: Any, side: str) -> None:
    inputs, method = batch(PROMPTS, side), pruner(**settings)
    pixels = list(inputs["pixel_values"].split([2, 1]))
    with torch.no_grad(), method(model) as run:
        together = model(**inputs).logits
        report = run.report.samples
        got = ends(together, inputs["attention_mask"], [sample.tokens[-1] for sample in report])
        for row, ids in enumerate(PROMPTS):
            one = {"input_ids": torch.tensor([ids])}
            if IMAGE in ids:
                one["pixel_values"] = pixels.pop(0)
            alone = model(**one).logits[0]
            torch.testing.assert_close(got[row], alone, rtol=1e-9, atol=1e-9)
            assert run.report.samples[-1].images == report[row].images


class TestEngine:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("faithful", [False, True])
    def test_version_2_equals_masked_dense(self, model: Any, side: str, faithful: bool) -> None:
        inputs = batch(PROMPTS, side)
        with torch.no_grad(), pruner(version=2, faithful=faithful)(model) as run:
            short = model(**inputs).logits
        stages = dropped_by_stage(run, inputs["input_ids"] == IMAGE)
        tokens = inputs["attention_mask"].bool()
        with torch.no_grad(), masked_from(model.model.language_model.layers, stages, tokens):
            dense = model(**inputs, use_cache=False).logits
        kept = tokens & ~stages[-1][1]
        for row, got in enumerate(ends(short, tokens, lengths(kept))):
            torch.testing.assert_close(got, dense[row, kept[row]], rtol=1e-9, atol=1e-9)

    def test_decode_of_version_2_equals_a_full_forward(self, model: Any) -> None:
        inputs = batch(PROMPTS)
        got, whole = decoded_and_whole(model, inputs, pruner(version=2))
        torch.testing.assert_close(got, whole, rtol=2e-6, atol=2e-6)

    def test_faithful_drops_one_where_all_are_to_stay(self, model: Any) -> None:
        inputs, keep = batch([prompt(3, 1, 5)]), (N, N, N)
        with torch.no_grad():
            dense = model(**inputs).logits
            for version in (1, 2):
                with pruner(keep=keep, version=version)(model) as run:
                    assert torch.equal(model(**inputs).logits, dense)
                (image,) = run.report.samples[0].images
                assert len(image.kept) == N
            with pruner(keep=keep, version=2, faithful=True)(model) as run:
                model(**inputs)
            (image,) = run.report.samples[0].images
            assert [len(kept) for _, kept in image.stages] == [N - 1, N - 2, N - 3]
            with pruner(keep=keep, faithful=True)(model) as run:
                model(**inputs)
            (image,) = run.report.samples[0].images
            # One is merged with itself, and may be kept or be so again.
            assert len(image.kept) + image.extra == N
            assert image.extra >= 1

    def test_reports_kept_and_merged(self, model: Any) -> None:
        with torch.no_grad(), pruner(keep=(9, 6, 3))(model) as run:
            model(**batch([prompt(3, 1, 5)]))
        (sample,) = run.report
        assert list(sample.tokens) == [8 + n for n in pruner(keep=(9, 6, 3)).counts(N, 6)]
        (image,) = sample.images
        assert len(image.kept) + image.extra == 3 + clusters(7 - 3)
        assert sample.cost.probe > 0

    def test_budget_that_an_image_cannot_meet(self, model: Any) -> None:
        table, words = pore.SparseVLM.published(192, layers=LAYERS), "Image 0 of sample 0: Stage 1"
        with pytest.raises(BudgetError, match=f"{words} should keep 300"), table(model):
            model(**batch([prompt(3, 1, 5)]))

    def test_after_the_last_layer_and_beyond(self, model: Any) -> None:
        """The output of a layer is pruned, the last one's too."""
        with torch.no_grad(), pruner(layers=(2, 6))(model) as run:
            out = model(**batch([prompt(3, 1, 5)]))
        assert out.logits.shape[1] == 8 + 4
        assert list(run.report.samples[0].tokens)[2:] == [16] * 4
        with pytest.raises(BudgetError, match="choose at most 6"), pruner(layers=(2, 7))(model):
            pass

    def test_several_axes_of_positions(self) -> None:
        """No one-axis prior there, and merged tokens take the place of their most central one."""
        (case,) = [case for case in CASES if case.name == "Qwen2-VL"]
        inputs = case.inputs([[5, -1, 6, 7, 8]])
        with pytest.raises(UnsupportedModelError, match="Use SparseVLM, or"):
            pruner(version=2)(case.model()).__enter__()
        seen.clear()
        with torch.no_grad(), Spy(4, (1, 2))(case.model()) as run:
            case.model()(**inputs)
        (image,) = run.report.samples[0].images
        assert len(image.kept) == 4
        assert image.extra == 0
        for view, _, selection in seen:
            assert not view.dense
            assert selection.raster is None
