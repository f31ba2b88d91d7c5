"""PyramidDrop: its budgets, where it reads a position bias, and the engine under several stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import StaticCache

import pore
from helpers.caches import as_argument
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from helpers.recording import Recording
from pore._compat.caches import cache_in
from pore.errors import BudgetError, ProfileMismatchError, ScoreError
from pore.families.registry import shape_of
from pore.methods.pyramiddrop import pyramid
from pore.tensors.selection import top_k

P = pore.PositionBias.exponential(0.3, N)
LAYERS = (1, 2, 4)
PROMPTS = [prompt(3, 2, 5), prompt(9, 0, 4, 1), prompt(1, 1, 1, 2)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava(layers=6)


def pruner(**settings: Any) -> pore.PyramidDrop:
    return pore.PyramidDrop(**{"keep": 3, "layers": LAYERS, **settings})


def answer(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )


class TestBudgets:
    def test_authors_numbers(self) -> None:
        assert pyramid(0.125, 3, 576) == [288, 144, 72]
        assert pyramid(72, 3, 576) == [288, 144, 72]
        assert pyramid((0.5, 0.25, 0.125), 3, 37) == [18, 9, 4]
        assert pyramid(0.125, 3, 37) == [18, 9, 4]
        counts = pore.PyramidDrop(0.125).counts(576, 32)
        assert counts == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
        assert sum(counts) / 32 == 270

    @given(st.integers(1, 3000), st.integers(1, 6), st.data())
    def test_number_is_met_at_the_end(self, available: int, stages: int, data: Any) -> None:
        keep = data.draw(st.integers(1, available))
        counts = pyramid(keep, stages, available)
        assert len(counts) == stages
        assert counts[-1] == keep
        assert [available, *counts] == sorted([available, *counts], reverse=True)

    @given(st.integers(1, 3000), st.integers(1, 6), st.floats(0, 1, exclude_min=True))
    def test_fraction_is_cut_off(self, available: int, stages: int, keep: float) -> None:
        assume(int(available * keep) > 0)
        counts = pyramid(keep, stages, available)
        assert counts[-1] == int(available * keep)
        assert [available, *counts] == sorted([available, *counts], reverse=True)

    @given(st.integers(1, 9), st.integers(1, 5))
    def test_equal_ratios_miss_no_whole_number(self, base: int, stages: int) -> None:
        available = base**stages
        assert pyramid(1, stages, available) == [base**i for i in reversed(range(stages))]

    @pytest.mark.parametrize(
        ("keep", "words"),
        [
            (0, "at least 1"),
            (1.5, "not a fraction"),
            ((0.5, 0.25), "2 numbers for 3 stages"),
            ((0.5, 0.25, 0.5), "rises"),
            ((8, 4, True), "must be an int"),
        ],
    )
    def test_bad_keep(self, keep: Any, words: str) -> None:
        with pytest.raises(BudgetError, match=words):
            pore.PyramidDrop(keep)

    def test_budgets_that_do_not_fit_the_image(self) -> None:
        with pytest.raises(BudgetError, match="more visual tokens than there are"):
            pyramid(17, 3, 16)
        with pytest.raises(BudgetError, match=r"\(4, 0.5, 2\).*|more visual tokens"):
            pyramid((4, 0.5, 2), 3, 16)
        with pytest.raises(BudgetError, match="truncated to 0"):
            pyramid(0.05, 3, 16)


class TestSettings:
    @pytest.mark.parametrize("layers", [(), (0, 2), (2, 2), (4, 2), (1.0, 2), (True, 2)])
    def test_bad_layers(self, layers: Any) -> None:
        with pytest.raises(BudgetError, match="first pruned layer of each stage"):
            pore.PyramidDrop(4, layers)

    def test_bad_index(self) -> None:
        with pytest.raises(ScoreError, match="original"):
            pore.PyramidDrop(4, index="raster")  # type: ignore[arg-type]

    def test_lists_as_json_gives_them(self) -> None:
        same = pore.PyramidDrop((0.5, 0.25), (1, 2), (P, P))
        assert pore.PyramidDrop([0.5, 0.25], [1, 2], [P, P]) == same  # type: ignore[arg-type]

    def test_layer_that_the_decoder_lacks(self, model: Any) -> None:
        with pytest.raises(BudgetError, match=r"choose at most 5"), pruner(layers=(1, 6))(model):
            pass

    def test_biases_for_other_stages(self, model: Any) -> None:
        with pytest.raises(ProfileMismatchError, match="2 corrections for 3 stages"):
            pruner(reweight=(P, P))
        origin = pore.Provenance(layer=3, normalize="prompt")
        measured = pore.PositionBias.exponential(0.3, N, provenance=origin)
        with (
            pytest.warns(UserWarning, match="made PyramidDrop worse where that was measured"),
            pruner(layers=(2,), reweight=measured)(model),
        ):
            pass
        with pytest.raises(ProfileMismatchError, match="layer"), pruner(reweight=measured)(model):
            pass

    def test_usual_layers(self) -> None:
        for depth, layers in {32: (8, 16, 24), 28: (7, 14, 21), 6: (1, 3, 4), 2: (1,)}.items():
            shape = shape_of(tiny_llava(layers=depth).config)
            assert pore.PyramidDrop.usual(5, shape).layers == layers


class TestReweight:
    def test_index_original_reads_p_at_the_patch(self, model: Any) -> None:
        recording = Recording(pore.PyramidDrop((10, 6, 3), LAYERS, reweight=P))
        with recording(model):
            model(**batch([prompt(3, 1, 5)]))
        seen = [(view, selection.keep) for _, view, selection in recording.seen]
        for (view, keep), count in zip(seen, (10, 6, 3), strict=True):
            fair = view.attention / P.values[view.layout.raster]
            assert torch.equal(keep, top_k(fair, [count]))
        assert any(not torch.equal(k, top_k(v.attention, k.sum(-1))) for v, k in seen)

    def test_index_dense_reads_p_at_the_distance_to_the_text(self, model: Any) -> None:
        biases = tuple(pore.PositionBias.exponential(rate, N) for rate in (0.2, 0.3, 0.4))
        recording = Recording(pore.PyramidDrop((10, 6, 3), LAYERS, biases, "dense"))
        with recording(model):
            model(**batch([prompt(3, 1, 5)]))
        for (_, view, selection), count, bias in zip(
            recording.seen, (10, 6, 3), biases, strict=True
        ):
            here = view.attention.shape[1]
            fair = view.attention / bias.values[N - here :]
            assert torch.equal(selection.keep, top_k(fair, [count]))


class TestEngine:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_batch_equals_its_samples(self, model: Any, side: str) -> None:
        with pruner()(model) as run:
            together = model(**batch(PROMPTS, side)).logits
            inputs = batch(PROMPTS, side)
            pixels = list(inputs["pixel_values"].split([2, 1]))
            for row, ids in enumerate(PROMPTS):
                one = {"input_ids": torch.tensor([ids])}
                if IMAGE in ids:
                    one["pixel_values"] = pixels.pop(0)
                alone = model(**one).logits[0]
                count = len(alone)
                got = together[row]
                got = got[:count] if side == "right" else got[len(got) - count :]
                torch.testing.assert_close(got, alone, rtol=1e-9, atol=1e-9)
        kept = [[image.stages for image in sample.images] for sample in run.report]
        assert kept[:3] == kept[3:]
        assert [len(images) for images in kept[:3]] == [2, 0, 1]
        assert [[len(k) for _, k in stages] for stages in kept[0]] == [pyramid(3, 3, N)] * 2

    def test_decode_equals_decode_one_by_one(self, model: Any) -> None:
        """Every layer's next position is what its cache holds, padding left out."""
        inputs = batch(PROMPTS)
        with pruner()(model):
            together = torch.stack(answer(model, inputs).logits, 1)
            pixels = list(inputs["pixel_values"].split([2, 1]))
            for row, ids in enumerate(PROMPTS):
                one = {"input_ids": torch.tensor([ids])}
                if IMAGE in ids:
                    one["pixel_values"] = pixels.pop(0)
                alone = torch.stack(answer(model, one).logits, 1)[0]
                torch.testing.assert_close(together[row], alone, rtol=2e-6, atol=2e-6)

    def test_static_cache(self, model: Any) -> None:
        """The mask of a static cache is as wide as the cache; the look ahead sees the prompt."""
        inputs = batch(PROMPTS)
        with pruner()(model):
            dynamic = answer(model, inputs)
            cache = StaticCache(config=model.config.text_config, max_cache_len=96)
            static = answer(model, inputs, **as_argument(cache))
        assert torch.equal(dynamic.sequences, static.sequences)
        torch.testing.assert_close(torch.stack(dynamic.logits), torch.stack(static.logits))

    @pytest.mark.parametrize("static", [False, True])
    def test_looks_at_what_was_said_before(self, model: Any, static: bool) -> None:
        """An image in a second turn is ranked as in one prompt of both turns."""
        turns = [[prompt(2, 0, 9), prompt(4, 0, 5, 1)], [prompt(3, 1, 5, 2), prompt(3, 1, 5, 3)]]
        # The first turn is padded on the left, and so is the prompt of both.
        inputs, first = batch([a + b for a, b in zip(*turns, strict=True)]), batch(turns[0])
        width = first["input_ids"].shape[1]
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        cache = StaticCache(config=model.config.text_config, max_cache_len=64) if static else None
        with torch.no_grad(), pruner()(model) as run:
            whole = model(**inputs, position_ids=positions).logits[:, -5:]
            said = model(
                **first, position_ids=positions[:, :width], **as_argument(cache), use_cache=True
            )
            second = model(
                input_ids=inputs["input_ids"][:, width:],
                attention_mask=inputs["attention_mask"],
                pixel_values=inputs["pixel_values"],
                position_ids=positions[:, width:],
                **as_argument(cache_in(said)),
            ).logits[:, -5:]
        samples = run.report.samples
        assert [s.images for s in samples[:2]] == [s.images for s in samples[4:]]
        torch.testing.assert_close(second, whole, rtol=1e-9, atol=1e-9)

    def test_second_image_after_a_pruned_one(self, model: Any) -> None:
        """What the layer has cached of the first turn is shorter than what came before it."""
        first, second = batch([prompt(3, 1, 5)]), batch([prompt(2, 1, 4, 1)], seed=1)
        with torch.no_grad(), pruner()(model) as run:
            cache = cache_in(model(**first))
            alone = model(**second).logits
            del second["attention_mask"]
            after = model(**second, **as_argument(cache)).logits
        assert torch.isfinite(after).all()
        assert not torch.allclose(after, alone)
        counts = [len(i.kept) for s in run.report for i in s.images]
        assert counts == [3, 3, 3]
        lengths = [layer.get_seq_length() for layer in cache.layers]
        assert lengths == [14 + 2 * n for n in pruner().counts(N, 6)]

    def test_keep_all_is_bit_equal(self, model: Any) -> None:
        inputs = batch(PROMPTS)
        dense = model(**inputs).logits
        for keep in (N, 1.0, (1.0, 1.0, N)):
            with pruner(keep=keep)(model):
                assert torch.equal(model(**inputs).logits, dense)

    def test_after_a_method_of_the_tower(self, model: Any) -> None:
        """Stages on the way do not ask for more than the first method left."""
        chain = pore.Chain(pore.FasterVLM(keep=6), pruner(keep=2))
        with chain(model) as run:
            model(**batch([prompt(3, 1, 5)]))
        ((image,),) = (sample.images for sample in run.report)
        assert [len(kept) for _, kept in image.stages] == [6, 6, 4, 2]
        assert pyramid(2, 3, N) == [8, 4, 2]
        assert chain.counts(N, 6) == [6, 6, 4, 4, 2, 2]

    def test_cost_of_looking_ahead_is_reported(self, model: Any) -> None:
        with pruner()(model) as run:
            model(**batch([prompt(3, 1, 5)]))
        (sample,) = run.report
        width, heads, kv = 32, 4, 2
        size = width // heads
        cost = 0
        for count in (N, *pyramid(3, 3, N)[:-1]):
            n = 8 + count
            cost += 2 * n * width * size * (heads + 2 * kv) + 2 * n * width
        assert sample.cost.probe == cost
