"""SparseVLM: raters, budgets with merged tokens, clusters, and the engine under both versions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import pore
from cases import CASES
from helpers.methods import Recording, ends
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from helpers.reference import dropped_by_stage, masked_from
from pore.bias.curves import ROPE_FLOOR, rope_prior
from pore.engine.stages import Selection, View
from pore.errors import BudgetError, ProfileMismatchError, ScoreError, UnsupportedModelError
from pore.methods._sparsevlm import (
    Rated,
    Raters,
    clusters,
    density_peaks,
    matrix_ranks,
    merge,
    rate,
    recycle,
    split,
    strongest_heads,
)
from pore.tensors.selection import top_k

P = pore.PositionBias.exponential(0.3, N)
LAYERS = (1, 2, 4)
PROMPTS = [prompt(3, 2, 5), prompt(9, 0, 4, 1), prompt(1, 1, 1, 2)]
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava(layers=6)


KINDS = {1: pore.SparseVLM, 2: pore.SparseVLMPlus}


def pruner(version: int = 1, **settings: Any) -> pore.SparseVLM:
    return KINDS[version](**{"keep": 4, "layers": LAYERS, **settings})


def features(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def lengths(mask: Tensor) -> list[int]:
    return mask.sum(-1).tolist()  # type: ignore[no-any-return]


class TestBudgets:
    def test_authors_numbers(self) -> None:
        """Tokens behind the stages, and what enters the layers on average."""
        for version, rows in {
            1: {192: 206.5, 128: 145.4, 96: 114.1, 64: 82.3},
            2: {192: 206.8, 128: 144.1, 96: 113.9, 64: 81.8},
        }.items():
            for tokens, average in rows.items():
                counts = KINDS[version].published(tokens).counts(576, 32)
                assert sum(counts) / 32 == pytest.approx(average, abs=0.06)
        behind = [(309, 204, 113), (312, 117, 39), (249, 55, 27), (82, 32, 18)]
        for tokens, expected in zip((192, 128, 96, 64), behind, strict=True):
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
        with pytest.raises(BudgetError, match="Stage 2 is to keep 9 visual tokens, but 8 are"):
            pore.SparseVLMPlus((8, 9), (1, 3)).counts(16, 5)

    @pytest.mark.parametrize(
        ("settings", "error", "words"),
        [
            ({"keep": 0}, BudgetError, "at least 1"),
            ({"keep": (4, 3)}, BudgetError, "2 numbers for 3 stages"),
            ({"keep": (4, 3, 2.0)}, BudgetError, "no fraction"),
            ({"layers": (2, 2, 3)}, BudgetError, "no stages"),
            ({"version": 2, "heads": 0}, ScoreError, "at least 1"),
            ({"index": "raster"}, ScoreError, "'original' or 'dense'"),
            ({"reweight": (P, P)}, ProfileMismatchError, "2 position biases for 3 stages"),
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
        made = _Spy(4, LAYERS)
        raters.clear()
        with made(model):
            model(**batch([prompt(3, 1, 1)]))
        assert raters[0].index.tolist() == [[3 + N]]
        assert raters[0].valid.all()

    def test_are_found_in_every_image_and_layout(self, model: Any) -> None:
        """By hand from the embeddings, for two images in a prompt and a padded one."""
        raters.clear()
        inputs = batch(PROMPTS)
        with torch.no_grad(), _Spy(4, LAYERS)(model):
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


class TestClusters:
    @given(seeds, st.integers(1, 24), st.data())
    def test_every_cluster_has_its_centre(self, seed: int, m: int, data: Any) -> None:
        count = data.draw(st.integers(1, m))
        x, valid = features(seed, 1, m, 3), torch.ones(1, m, dtype=torch.bool)
        cluster, centres = density_peaks(x, [count], valid)
        assert cluster[0, centres[0]].tolist() == list(range(count))
        assert set(cluster[0].tolist()) == set(range(count))
        distance = torch.cdist(x, x)[0][:, centres[0]]
        others = torch.ones(m, dtype=torch.bool)
        others[centres[0]] = False
        assert torch.equal(cluster[0, others], distance[others].argmin(-1))

    @given(seeds, st.integers(3, 16), st.data(), st.randoms(use_true_random=False))
    def test_move_with_the_tokens(self, seed: int, m: int, data: Any, random: Any) -> None:
        count = data.draw(st.integers(1, m).filter(lambda c: c != 2))
        order = list(range(m))
        random.shuffle(order)
        x, valid = features(seed, 1, m, 3), torch.ones(1, m, dtype=torch.bool)
        cluster, _ = density_peaks(x, [count], valid)
        moved, _ = density_peaks(x[:, order], [count], valid)
        # With as many clusters as tokens all densities are of all distances, and can be equal.
        assume(count < m)
        torch.testing.assert_close(
            merge(x[:, order], moved, valid, count), merge(x, cluster, valid, count)
        )

    def test_noise_is_what_the_authors_add(self) -> None:
        """It decides between two that are each other's nearest; here the first is the centre."""
        x = torch.tensor([[[10.0], [11.0], [0.0], [2.0]]])
        valid = torch.ones(1, 4, dtype=torch.bool)
        first, second = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[0, 1.0, 0, 0]])
        plain, centres = density_peaks(x, [2], valid)
        assert plain.tolist() == [[0, 0, 1, 1]]
        assert centres.tolist() == [[0, 2]]
        assert density_peaks(x, [2], valid, first)[1][0, 0] == 0
        assert density_peaks(x, [2], valid, second)[1][0, 0] == 1

    def test_equal_tokens(self) -> None:
        x = torch.ones(1, 12, 5)
        valid = torch.ones(1, 12, dtype=torch.bool)
        cluster, centres = density_peaks(x, [2], valid)
        assert centres.tolist() == [[0, 1]]
        assert cluster[0].tolist() == [0, 1] + [0] * 10
        assert torch.equal(merge(x, cluster, valid, 2), torch.ones(1, 2, 5))

    def test_far_away_tokens_do_not_underflow(self) -> None:
        """Densities are compared by their logarithms."""
        x = 1e3 * features(0, 1, 20, 8).float()
        valid = torch.ones(1, 20, dtype=torch.bool)
        near, _ = density_peaks(x.double(), [3], valid)
        assert torch.equal(density_peaks(x, [3], valid)[0], near)

    @given(seeds)
    def test_merging_keeps_the_sum(self, seed: int) -> None:
        x, valid = features(seed, 2, 9, 3), torch.arange(9) < torch.tensor([[9], [5]])
        cluster, _ = density_peaks(x, [3, 2], valid)
        means = merge(x, cluster, valid, 3)
        for i, (count, m) in enumerate([(3, 9), (2, 5)]):
            sizes = torch.bincount(cluster[i, :m], minlength=count).to(x)
            total = (sizes[:, None] * means[i, :count]).sum(0)
            torch.testing.assert_close(total, x[i, :m].sum(0))
        assert not means[1, 2].any()

    @given(seeds, st.lists(st.integers(1, 40), min_size=1, max_size=4), st.data())
    def test_recycling_a_batch_equals_its_images(
        self, seed: int, sizes: list[int], data: Any
    ) -> None:
        widest = max(sizes)
        x, scores = features(seed, len(sizes), widest, 6), features(seed + 1, len(sizes), widest)
        valid = torch.arange(widest) < torch.tensor(sizes)[:, None]
        shares = [split(data.draw(st.integers(1, size)), size) for size in sizes]
        assume(any(merged for _, merged in shares))
        kept, merged = [s[0] for s in shares], [s[1] for s in shares]
        keep = top_k(scores, kept, valid)
        raster = torch.arange(widest).expand(len(sizes), -1)
        for behind in (True, False):
            together = recycle(x, raster, scores, keep, valid, merged, behind)
            assert lengths(together.keep) == [sum(share) for share in shares]
            for i, size in enumerate(sizes):
                if not merged[i]:
                    chosen = together.features[i][together.keep[i]]
                    assert torch.equal(chosen, x[i][keep[i]])
                    continue
                one = slice(i, i + 1), slice(0, size)
                alone = recycle(
                    x[one], raster[one], scores[one], keep[one], valid[one], [merged[i]], behind
                )
                assert torch.equal(together.keep[one], alone.keep)
                got, expected = together.features[i][together.keep[i]], alone.features[alone.keep]
                torch.testing.assert_close(got, expected)
                if behind:
                    assert torch.equal(got[: kept[i]], x[i][keep[i]])
                    rasters = together.raster[i][together.keep[i]].tolist()
                    assert rasters == [*raster[i][keep[i]].tolist(), *[-1] * merged[i]]
                else:
                    assert torch.equal(together.features[i][keep[i]], x[i][keep[i]])


@given(seeds, st.integers(1, 20), st.floats(0.1, 10))
def test_strongest_heads(seed: int, count: int, scale: float) -> None:
    scores = features(seed, 2, 16, 5).abs()
    chosen = strongest_heads(scores, count)
    assert chosen.shape == (2, min(count, 16))
    assert torch.equal(chosen, strongest_heads(scores * scale, count))
    expected = scores.sum(-1).topk(min(count, 16)).indices
    assert torch.equal(chosen, expected)


def test_ranks_of_matrices_of_several_sizes() -> None:
    full, low = features(0, 4, 9), features(1, 4, 2) @ features(2, 2, 6)
    matrix = torch.zeros(2, 5, 9, dtype=torch.float64)
    matrix[0, :4], matrix[1, :4, :6] = full, low
    assert matrix_ranks(matrix, [9, 6]) == [4, 2]


class _Watch:
    """SparseVLM that remembers what its stages saw and chose."""

    def _select(self, stage: int, view: View) -> Selection:
        selection = super()._select(stage, view)
        seen.append((view, self._scores(stage, view, view.attention), selection))
        return selection

    def _rate(self, view: View) -> Raters:
        raters.append(super()._rate(view))
        return raters[-1]


class _Spy(_Watch, pore.SparseVLM):
    pass


class _SpyPlus(_Watch, pore.SparseVLMPlus):
    pass


seen: list[tuple[View, Tensor, Selection]] = []
raters: list[Raters] = []


def stages_of(
    model: Any, inputs: dict[str, Tensor], version: int = 1, **settings: Any
) -> list[Any]:
    """What every stage saw, how it scored and what it chose."""
    seen.clear()
    raters.clear()
    kind = _Spy if version == 1 else _SpyPlus
    with torch.no_grad(), kind(**{"keep": 4, "layers": LAYERS, **settings})(model):
        model(**inputs)
    return list(seen)


class TestScores:
    inputs = batch([prompt(3, 1, 7)])

    def test_are_those_of_full_attention(self) -> None:
        eager = tiny_llava(layers=6, attention="eager")
        with torch.no_grad():
            weights = eager(**self.inputs, output_attentions=True).attentions[0][0]
        ((view, scores, _), *_) = stages_of(tiny_llava(layers=6), self.inputs)
        rows = raters[0].index[0]
        expected = weights[:, rows, 3 : 3 + N].mean((0, 1))
        torch.testing.assert_close(scores[0], expected, rtol=1e-5, atol=1e-7)
        assert isinstance(view.attention, Rated)

    def test_prior_of_version_2(self, model: Any) -> None:
        """W of the model's own rotary embedding divides the row of every rater."""
        inputs = batch([prompt(3, 1, 100)])
        ((one, *_), *_) = stages_of(model, inputs, version=2, faithful=True)
        prior = raters[0].prior
        assert prior is not None
        expected = rope_prior(torch.arange(len(prior)), head_dim=8)
        torch.testing.assert_close(prior, expected, rtol=0, atol=1e-6)  # frequencies in float32
        assert prior.min() < 0
        eager = tiny_llava(layers=6, attention="eager")
        with torch.no_grad():
            weights = eager(**inputs, output_attentions=True).attentions[0][0]
        rows, columns = raters[0].index[0], torch.arange(3, 3 + N)
        fair = weights[:, rows][..., columns] / prior[rows[:, None] - columns]
        torch.testing.assert_close(one.attention.corrected[0], fair.mean(1), rtol=1e-5, atol=1e-7)

    def test_prior_does_not_turn_the_ranking_round(self, model: Any) -> None:
        stages_of(model, batch([prompt(3, 1, 100)]), version=2)
        prior = raters[0].prior
        assert prior is not None
        assert prior.min() == ROPE_FLOOR * prior[0]

    def test_heads(self, model: Any) -> None:
        ((view, scores, _), *_) = stages_of(model, self.inputs, version=2, heads=1)
        heads = view.attention.corrected[0]
        assert torch.equal(scores[0], heads[heads.sum(-1).argmax()])
        ((view, scores, _), *_) = stages_of(model, self.inputs, version=2)
        torch.testing.assert_close(scores, view.attention.corrected.mean(1))

    @pytest.mark.parametrize("version", [1, 2])
    def test_reweight(self, model: Any, version: int) -> None:
        """P divides the attention; in version 2 it stands in for the prior."""
        biases = tuple(pore.PositionBias.exponential(rate, N) for rate in (0.2, 0.3, 0.4))
        found = stages_of(model, self.inputs, version=version, reweight=biases)
        assert raters[0].prior is None
        for (view, scores, _), bias in zip(found, biases, strict=True):
            attention = view.attention
            assert attention.corrected is None
            places = view.layout.places(N)[0]
            expected = attention.attention[0].mean(0) / bias.values[places]
            torch.testing.assert_close(scores[0], expected)

    def test_reweight_in_the_numbering_of_the_stage(self, model: Any) -> None:
        found = stages_of(model, self.inputs, reweight=P, index="dense")
        for view, scores, _ in found:
            here = scores.shape[1]
            expected = view.attention.attention[0].mean(0) / P.values[N - here :]
            torch.testing.assert_close(scores[0], expected)

    def test_bias_measured_elsewhere(self, model: Any) -> None:
        for name, where in {"layer": {"layer": 5}, "normalize": {"normalize": "prompt"}}.items():
            origin = pore.Provenance(**where)
            bias = pore.PositionBias.exponential(0.3, N, provenance=origin)
            with pytest.raises(ProfileMismatchError, match=name), pruner(reweight=bias)(model):
                pass


class TestRankBudget:
    def test_deletes_what_is_beyond_the_rank(self, model: Any) -> None:
        inputs = batch([prompt(3, 1, 9)])
        for version in (1, 2):
            found = stages_of(model, inputs, keep=pore.RankBudget(0.5), version=version)
            here = N
            for view, scores, selection in found:
                assert view.layout.counts == [here]
                rank = int(torch.linalg.matrix_rank(view.attention.matrix[0]))
                assert 0 < rank <= int(raters[0].valid.sum())
                kept = here - int(0.5 * (here - rank))
                here = kept + (clusters(here - kept) if version == 1 else 0)
                assert lengths(selection.keep) == [here]
                best = top_k(scores, [kept])
                if version == 2:
                    assert torch.equal(selection.keep, best)
            assert here < N

    def test_small_scale_deletes_nothing(self, model: Any) -> None:
        inputs = batch(PROMPTS)
        with torch.no_grad():
            dense = model(**inputs).logits
            with pruner(keep=pore.RankBudget(1e-3))(model):
                assert torch.equal(model(**inputs).logits, dense)

    def test_count_is_not_known_before(self) -> None:
        with pytest.raises(BudgetError, match="depends on the image"):
            pruner(keep=pore.RankBudget(0.5)).counts(N, 6)


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
        recording = Recording(pruner(version=2))
        with torch.no_grad(), recording(model):
            out = model.generate(
                **inputs,
                max_new_tokens=5,
                do_sample=False,
                suppress_tokens=[IMAGE],
                output_logits=True,
                return_dict_in_generate=True,
            )
        recording.replays = True
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
        full = dict(inputs, input_ids=out.sequences[:, :-1], attention_mask=mask)
        full["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad(), recording(model):
            logits = model(**full, use_cache=False).logits[:, -5:]
        torch.testing.assert_close(torch.stack(out.logits, 1), logits.float(), rtol=2e-6, atol=2e-6)

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
        with pytest.raises(BudgetError, match=f"{words} is to keep 300"), table(model):
            model(**batch([prompt(3, 1, 5)]))

    def test_behind_the_last_layer_and_beyond(self, model: Any) -> None:
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
        with torch.no_grad(), _Spy(4, (1, 2))(case.model()) as run:
            case.model()(**inputs)
        (image,) = run.report.samples[0].images
        assert len(image.kept) == 4
        assert image.extra == 0
        for view, _, selection in seen:
            assert not view.dense
            assert selection.raster is None
