"""SGL: what the small model looked at, against eager attention, and what follows from it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pore
from cases import CASES
from cases.base import TEXT, Case
from helpers.engine import _flash, _forward_text, fingerprint
from helpers.families import PROMPTS as FAMILY_PROMPTS
from helpers.families import forward, hidden_from
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from helpers.reference import dropped_columns, masked_from
from pore.cost.named import model_shape
from pore.errors import BudgetError, InputError, ModelStateError, PoreError, ScoreError
from pore.layout import Image, Layout
from pore.methods import guiding
from pore.methods.registry import methods
from pore.tensors.selection import budget, top_k

PROMPTS = [prompt(3, 2, 5), prompt(9, 0, 4, 1), prompt(1, 1, 2, 2)]
STEPS = 4
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module")
def small() -> Any:
    return tiny_llava(layers=3)


@pytest.fixture(scope="module")
def large() -> Any:
    return tiny_llava(layers=5, seed=1)


@pytest.fixture(scope="module")
def guide(small: Any) -> pore.Guide:
    return pore.guide(small, batch(PROMPTS), max_new_tokens=STEPS)


def alone(prompts: list[list[int]], inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """The inputs of one sample of a batch, without padding."""
    first = sum(ids.count(IMAGE) // N for ids in prompts[:row])
    count = prompts[row].count(IMAGE) // N
    one = {"input_ids": torch.tensor([prompts[row]])}
    if count:
        one["pixel_values"] = inputs["pixel_values"][first : first + count]
    return one


def with_attention(model: Any, name: str) -> Any:
    """The same weights under another attention implementation."""
    if name == "flash_test":
        ALL_ATTENTION_FUNCTIONS.register("flash_test", _flash)
        ALL_MASK_ATTENTION_FUNCTIONS.register("flash_test", flash_attention_mask)
    twin = tiny_llava(layers=len(model.model.language_model.layers))
    twin.load_state_dict(model.state_dict())
    twin.model.language_model.config._attn_implementation_internal = name
    return twin


class TestGuide:
    @pytest.mark.parametrize("row", [0, 2])
    def test_importance_is_that_of_eager_attention(
        self, small: Any, guide: pore.Guide, row: int
    ) -> None:
        """Sums over layers, heads and rows: from the last visual token to the last token fed."""
        one = alone(PROMPTS, batch(PROMPTS), row)
        answer = guide.sequences[row : row + 1]
        full = {**one, "input_ids": torch.cat([one["input_ids"], answer[:, :-1]], 1)}
        out = with_attention(small, "eager")(**full, output_attentions=True, use_cache=False)
        visual = one["input_ids"][0] == IMAGE
        start = int(visual.nonzero().max())
        expected = sum(weights[0, :, start:].sum((0, 1)) for weights in out.attentions)
        expected = expected[: len(visual)][visual]
        got = torch.cat(
            [v for v, i in zip(guide.importance, guide.images, strict=True) if i.row == row]
        )
        # Eager attention takes its softmax in float32.
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-7)

    @pytest.mark.parametrize("attention", ["sdpa", "flash_test"])
    def test_batch_equals_singles(self, small: Any, attention: str) -> None:
        model, inputs = with_attention(small, attention), batch(PROMPTS)
        together = pore.guide(model, inputs, max_new_tokens=STEPS)
        assert len(together) == 3
        for row in range(3):
            one = pore.guide(model, alone(PROMPTS, inputs, row), max_new_tokens=STEPS)
            part = together.select([row])
            assert len(part.images) == len(one.images)
            torch.testing.assert_close(
                part.importance, one.importance, **CLOSE, check_dtype=len(one.images) > 0
            )
            assert torch.equal(part.sequences, one.sequences)
            torch.testing.assert_close(part.confidence, one.confidence)

    def test_answers_that_end_early(self, small: Any, guide: pore.Guide) -> None:
        """What is generated behind the end of a shorter answer counts for nothing."""
        model, inputs = with_attention(small, "sdpa"), batch(PROMPTS)
        end = int(guide.sequences[0, 1])
        assert end not in guide.sequences[2]
        model.generation_config.eos_token_id = [end, 95]
        together = pore.guide(model, inputs, max_new_tokens=STEPS)
        assert together.answered[0].tolist() == [True, True, False, False]
        assert together.answered[2].all()
        for row in range(3):
            one = pore.guide(model, alone(PROMPTS, inputs, row), max_new_tokens=STEPS)
            part = together.select([row]).importance
            torch.testing.assert_close(part.double(), one.importance.double(), **CLOSE)
            torch.testing.assert_close(together.confidence[row], one.confidence[0])
            got = pore.consistency(model, inputs, together, keep=3)[row]
            alone_got = pore.consistency(model, alone(PROMPTS, inputs, row), one, keep=3)[0]
            torch.testing.assert_close(got, alone_got, **CLOSE)
        assert together.importance[0].sum() < guide.importance[0].sum()

    def test_confidence_is_a_geometric_mean(self, small: Any, guide: pore.Guide) -> None:
        out = small.generate(
            **batch(PROMPTS),
            max_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert torch.equal(out.sequences[:, -STEPS:], guide.sequences)
        greatest = torch.stack(out.logits, 1).softmax(-1).amax(-1)
        torch.testing.assert_close(guide.confidence, greatest.prod(1) ** (1 / STEPS))

    def test_a_static_cache_and_settings_of_the_model(self, small: Any, guide: pore.Guide) -> None:
        """It is greedy whatever the model's own settings are."""
        model = with_attention(small, "sdpa")
        model.generation_config.update(
            cache_implementation="static", num_beams=2, do_sample=True, return_dict_in_generate=True
        )
        got = pore.guide(model, batch(PROMPTS), max_new_tokens=STEPS)
        torch.testing.assert_close(got.importance, guide.importance, **CLOSE)
        assert torch.equal(got.sequences, guide.sequences)

    def test_many_rows_are_taken_in_parts(self, small: Any, monkeypatch: Any) -> None:
        inputs = batch([prompt(2, 1, 20), prompt(2, 1, 3, 1)])
        whole = pore.guide(small, inputs, max_new_tokens=2)
        monkeypatch.setattr(guiding, "_ROWS", 3)
        parts = pore.guide(small, inputs, max_new_tokens=2)
        torch.testing.assert_close(parts.importance, whole.importance, **CLOSE)

    def test_prompts_given_as_embeddings(self, small: Any, guide: pore.Guide) -> None:
        inputs = batch(PROMPTS)
        visual = inputs["input_ids"] == IMAGE
        embeds = small.get_input_embeddings()(inputs["input_ids"]).detach()
        features = small.get_image_features(inputs["pixel_values"]).pooler_output
        embeds[visual] = torch.cat(list(features)).detach()
        given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
        got = pore.guide(small, given, max_new_tokens=STEPS, visual=visual)
        assert torch.equal(got.sequences, guide.sequences)
        torch.testing.assert_close(got.importance, guide.importance, **CLOSE)
        torch.testing.assert_close(
            pore.consistency(small, given, got, keep=4),
            pore.consistency(small, inputs, guide, keep=4),
            **CLOSE,
        )
        with pytest.raises(InputError, match="visual=mask"):
            pore.guide(small, given, max_new_tokens=STEPS)

    def test_prompts_without_image(self, small: Any, large: Any) -> None:
        inputs = batch([prompt(5, 0, 3)])
        got = pore.guide(small, inputs, max_new_tokens=2)
        assert got.importance.shape == (0, 0)
        dense = large(**inputs).logits
        with pore.SGL(4, layer=2, guide=got)(large):
            assert torch.equal(large(**inputs).logits, dense)
        answered = pore.consistency(small, inputs, got)
        torch.testing.assert_close(answered, got.confidence.double() ** 2, rtol=1e-6, atol=0.0)

    def test_a_prompt_that_ends_with_its_image(self, small: Any) -> None:
        """The last visual token's own row is among those summed, so there is one."""
        inputs = batch([[5, 6, *[IMAGE] * N]])
        got = pore.guide(small, inputs, max_new_tokens=1).importance
        assert bool((got > 0).all())
        assert got.sum() < 3 * 4  # at most one row of 4 heads in 3 layers

    def test_leaves_the_model_as_it_was(self, small: Any) -> None:
        before, inputs = fingerprint(small), batch(PROMPTS)
        made = pore.guide(small, inputs, max_new_tokens=2)
        pore.consistency(small, inputs, made, keep=2)
        assert fingerprint(small) == before

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        hook = small.model.language_model.layers[1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            pore.guide(small, inputs, max_new_tokens=2)
        hook.remove()
        assert fingerprint(small) == before

    def test_refusals(self, small: Any) -> None:
        with pytest.raises(InputError, match="pad on the left"):
            pore.guide(small, batch(PROMPTS, "right"), max_new_tokens=2)
        with pore.FastV(4)(small), pytest.raises(ModelStateError, match="already pruned"):
            pore.guide(small, batch(PROMPTS), max_new_tokens=2)
        broken = with_attention(small, "sdpa")
        broken.model.language_model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
        with pytest.raises(ScoreError, match="NaN or infinity"):
            pore.guide(broken, batch(PROMPTS), max_new_tokens=2)


class TestSelectAndMatch:
    def layout(self, counts: list[int], copies: int = 1) -> Layout:
        images = [
            Image(row * copies + copy, index, range(index * 9, index * 9 + 4 + index))
            for row, count in enumerate(counts)
            for copy in range(copies)
            for index in range(count)
        ]
        return Layout.of(images, torch.ones(len(counts) * copies, 40, dtype=torch.bool))

    def guide(self, counts: list[int]) -> pore.Guide:
        images, rows = self.layout(counts).images, len(counts)
        importance = torch.arange(len(images))[:, None].expand(-1, 8).double()
        return pore.Guide(
            images=images,
            importance=importance,
            valid=torch.ones_like(importance, dtype=torch.bool),
            sequences=torch.arange(rows)[:, None],
            answered=torch.ones(rows, 1, dtype=torch.bool),
            confidence=torch.linspace(0, 1, rows),
            provenance=pore.Provenance(),
        )

    @given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.integers(1, 3), st.data())
    def test_repeated_samples_find_their_images(
        self, counts: list[int], copies: int, data: Any
    ) -> None:
        guide = self.guide(counts)
        chosen = data.draw(st.permutations(range(len(counts))))
        part = guide.select(chosen)
        assert part.sequences[:, 0].tolist() == chosen
        which = part.match(self.layout([counts[i] for i in chosen], copies))
        numbers = part.importance[which, 0].tolist() if which else []
        rows = [guide.images[int(number)].row for number in numbers]
        expected = [i for i in chosen for _ in range(copies * counts[i])]
        assert rows == expected

    @given(
        st.lists(st.integers(0, 3), min_size=1, max_size=4),
        st.lists(st.integers(0, 3), min_size=1, max_size=4),
    )
    def test_other_images_are_refused(self, here: list[int], there: list[int]) -> None:
        guide = self.guide(here)
        copies = max(len(there) // len(here), 1)
        if there == [count for count in here for _ in range(copies)]:
            guide.match(self.layout(there))
        else:
            with pytest.raises(InputError, match="same batch of prompts"):
                guide.match(self.layout(there))

    def test_no_such_sample(self) -> None:
        with pytest.raises(InputError, match="0 to 1"):
            self.guide([1, 1]).select([2])


class TestPruning:
    @pytest.mark.parametrize("layer", [0, 2, 4])
    @pytest.mark.parametrize("attention", ["sdpa", "flash_test"])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_keeps_what_the_guide_looked_at(
        self, large: Any, guide: pore.Guide, layer: int, side: str, attention: str
    ) -> None:
        twin, inputs = tiny_llava(layers=5, seed=1), batch(PROMPTS, side)
        twin.model.language_model.config._attn_implementation_internal = attention
        if attention == "flash_test":
            with_attention(large, attention)  # registers it
        with torch.no_grad(), pore.SGL(5, layer=layer, guide=guide)(twin) as run:
            short = twin(**inputs).logits
        wanted = top_k(guide.importance, [5] * 3, guide.valid)
        kept = [image.kept for sample in run.report for image in sample.images]
        assert kept == [tuple(row.nonzero()[:, 0].tolist()) for row in wanted]
        dropped = dropped_columns(run, inputs["input_ids"], IMAGE)
        tokens = inputs["attention_mask"].bool()
        inputs["position_ids"] = (tokens.cumsum(-1) - 1).clamp(min=0)
        with (
            torch.no_grad(),
            masked_from(large.model.language_model.layers, [(layer, dropped)], tokens),
        ):
            dense = large(**inputs, use_cache=False).logits
        for row in range(3):
            stay = tokens[row] & ~dropped[row]
            n = int(stay.sum())
            got = short[row, :n] if side == "right" else short[row, -n:]
            torch.testing.assert_close(got, dense[row, stay], **CLOSE)

    @pytest.mark.parametrize("layer", [0, 2])
    def test_beams_and_decoding(self, large: Any, guide: pore.Guide, layer: int) -> None:
        inputs = batch(PROMPTS)
        with torch.no_grad(), pore.SGL(0.25, layer=layer, guide=guide)(large) as run:
            out = large.generate(
                **inputs,
                max_new_tokens=STEPS,
                do_sample=False,
                suppress_tokens=[IMAGE],
                output_logits=True,
                return_dict_in_generate=True,
            )
            large.generate(**inputs, max_new_tokens=STEPS, do_sample=False, num_beams=3)
        images = [sample.images for sample in run.report]
        assert images[3:] == [images[row] for row in (0, 0, 0, 1, 1, 1, 2, 2, 2)]
        dropped = dropped_columns(run, inputs["input_ids"].repeat(4, 1), IMAGE)[:3]
        tokens, width = inputs["attention_mask"], inputs["input_ids"].shape[1]
        full = dict(inputs, input_ids=out.sequences[:, :-1])
        full["attention_mask"] = torch.nn.functional.pad(tokens, (0, STEPS - 1), value=1)
        full["position_ids"] = (full["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        layers = large.model.language_model.layers
        with torch.no_grad(), masked_from(layers, [(layer, dropped)], tokens.bool()):
            dense = large(**full, use_cache=False).logits[:, width - 1 :].float()
        torch.testing.assert_close(torch.stack(out.logits, 1), dense, rtol=2e-6, atol=2e-6)

    def test_of_some_samples_only(self, large: Any, guide: pore.Guide) -> None:
        inputs, reports = batch(PROMPTS), []
        with torch.no_grad(), pore.SGL(5, layer=2, guide=guide)(large) as run:
            large(**inputs)
        reports.append(run.report.samples[2].images)
        with torch.no_grad(), pore.SGL(5, layer=2, guide=guide.select([2]))(large) as run:
            large(**alone(PROMPTS, inputs, 2))
        reports.append(run.report.samples[0].images)
        assert reports[0] == reports[1]

    def test_behind_another_method(self, large: Any, guide: pore.Guide) -> None:
        """Importance is read at the patches that are left."""
        chain = pore.Chain(pore.FasterVLM(8), pore.SGL(3, layer=2, guide=guide))
        with torch.no_grad(), chain(large) as run:
            large(**batch(PROMPTS))
        images = [image for sample in run.report for image in sample.images]
        for importance, image in zip(guide.importance, images, strict=True):
            left = list(image.stages[0][1])
            best = importance[left].argsort(descending=True)[:3].tolist()
            assert list(image.kept) == sorted(left[i] for i in best)
        assert chain.counts(N, 5) == [8, 8, 3, 3, 3]

    def test_keep_all_is_bit_equal(self, large: Any, guide: pore.Guide) -> None:
        inputs = batch(PROMPTS)
        dense = large(**inputs).logits
        for layer in (0, 2):
            with pore.SGL(N, layer=layer, guide=guide)(large):
                assert torch.equal(large(**inputs).logits, dense)

    def test_it_cannot_be_set_up_without_a_guide(self) -> None:
        assert methods()["SGL"].usual(64, model_shape("llava-1.5-7b")) is None


class TestBudget:
    @given(st.integers(1, 2000), st.floats(0.001, 1.0))
    def test_the_authors_truncate_in_single_precision(self, visual: int, keep: float) -> None:
        pruner = pore.SGL(keep, 1, guide=None, faithful=True)  # type: ignore[arg-type]
        assert pruner.counts(visual, 2) == [visual, int(torch.tensor(float(visual)) * keep)]

    @given(st.integers(1, 2000), st.floats(0.001, 1.0))
    def test_by_default_as_everywhere(self, visual: int, keep: float) -> None:
        pruner = pore.SGL(keep, 1, guide=None)  # type: ignore[arg-type]
        try:
            expected = budget(keep, visual)
        except BudgetError:
            with pytest.raises(BudgetError, match="rounds to none"):
                pruner.counts(visual, 2)
        else:
            assert pruner.counts(visual, 2) == [visual, expected]

    @pytest.mark.parametrize(("faithful", "kept"), [(False, 2), (True, 1)])
    def test_the_difference(self, large: Any, guide: pore.Guide, faithful: bool, kept: int) -> None:
        pruner = pore.SGL(0.12, 2, guide, faithful=faithful)  # of 16: 1.92
        with torch.no_grad(), pruner(large) as run:
            large(**batch(PROMPTS))
        assert {len(i.kept) for sample in run.report for i in sample.images} == {kept}

    def test_none_may_be_left_where_the_authors_leave_none(
        self, small: Any, large: Any, guide: pore.Guide
    ) -> None:
        inputs = batch(PROMPTS)
        for layer in (0, 2):
            pruner = pore.SGL(0.05, layer, guide, faithful=True)  # of 16: 0.8
            with torch.no_grad(), pruner(large) as run:
                large.generate(**inputs, max_new_tokens=2, do_sample=False)
            assert [s.tokens[-1] for s in run.report] == [10, 13, 3]
        assert pore.consistency(small, inputs, guide, keep=0.05, faithful=True).isfinite().all()
        with pytest.raises(BudgetError, match=r"0\.8|1 of 16|at least"):
            pore.consistency(small, inputs, guide, keep=0.02)


class TestReweighting:
    P = pore.PositionBias.exponential(0.3, N)

    def test_importance_is_divided(self, large: Any, guide: pore.Guide) -> None:
        with torch.no_grad(), pore.SGL(5, 2, guide, reweight=self.P)(large) as run:
            large(**batch(PROMPTS))
        wanted = top_k(guide.importance / self.P.values, [5] * 3, guide.valid)
        kept = [image.kept for sample in run.report for image in sample.images]
        assert kept == [tuple(row.nonzero()[:, 0].tolist()) for row in wanted]
        assert kept != [
            tuple(row.nonzero()[:, 0].tolist()) for row in top_k(guide.importance, [5] * 3)
        ]

    def test_a_bias_is_fitted_to_the_mean_importance(
        self, small: Any, large: Any, guide: pore.Guide
    ) -> None:
        small.config.name_or_path = "my/small"
        guides = [
            pore.guide(small, batch([prompt(3, 1, 5, seed)], seed=seed), max_new_tokens=2)
            for seed in range(3)
        ]
        mean = torch.cat([one.importance for one in guides]).mean(0)
        bias = pore.PositionBias.fit(mean, "empirical", provenance=guides[0].provenance)
        small.config.name_or_path = ""
        assert bias.provenance.model == "my/small"
        assert bias.provenance.host == "SGL"
        with pore.SGL(5, 2, guides[0], reweight=bias)(large) as run:
            large(**batch([prompt(3, 1, 5)]))
        assert len(run.report.samples[0].images[0].kept) == 5
        other = dataclasses.replace(guides[0].provenance, model="another/small")
        with (
            pytest.raises(PoreError, match="model"),
            pore.SGL(5, 2, dataclasses.replace(guides[0], provenance=other), bias)(large),
        ):
            pass

    def test_consistency_is_reweighted_too(self, small: Any, guide: pore.Guide) -> None:
        plain, divided = (
            pore.consistency(small, batch(PROMPTS), guide, keep=2, reweight=bias)
            for bias in (None, self.P)
        )
        assert not torch.equal(plain[[0, 2]], divided[[0, 2]])
        assert torch.equal(plain[1], divided[1])  # without image

    @pytest.mark.parametrize(("field", "value"), [("normalize", "prompt"), ("model", "other")])
    def test_a_bias_of_other_conditions(
        self, large: Any, guide: pore.Guide, field: str, value: Any
    ) -> None:
        seen = dataclasses.replace(guide.provenance, model="small")
        guide = dataclasses.replace(guide, provenance=seen)
        provenance = dataclasses.replace(self.P.provenance, **{field: value})
        bias = dataclasses.replace(self.P, provenance=provenance)
        with pytest.raises(PoreError, match=field), pore.SGL(5, 2, guide, reweight=bias)(large):
            pass
        with pore.SGL(5, 2, guide, reweight=bias.allowing(field))(large):
            large(**batch(PROMPTS))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
class TestFamilies:
    """One model of every family guides itself."""

    prompts = FAMILY_PROMPTS["several"]

    def guided(self, case: Case, prompts: Any, monkeypatch: Any) -> pore.Guide:
        model = case.model()
        words = range(model.config.get_text_config().vocab_size)
        others = sorted(set(words) - set(TEXT))  # a full forward must not take answers for images
        monkeypatch.setattr(model.generation_config, "suppress_tokens", others)
        return pore.guide(model, case.inputs(prompts), max_new_tokens=STEPS)

    def dropped(self, case: Case, guide: pore.Guide, keep: int) -> Tensor:
        kept = top_k(guide.importance, [keep] * len(guide.images), guide.valid)
        dropped = torch.zeros_like(case.inputs(self.prompts)["input_ids"], dtype=torch.bool)
        for image, stays in zip(guide.images, kept.tolist(), strict=True):
            gone = [c for c, stay in zip(image.columns, stays, strict=False) if not stay]
            dropped[image.row, gone] = True
        return dropped

    def test_prunes(self, case: Case, monkeypatch: Any) -> None:
        inputs, model = case.inputs(self.prompts), case.model()
        guide = self.guided(case, self.prompts, monkeypatch)
        for layer in (0, 2):
            with pore.SGL(5, layer=layer, guide=guide)(model):
                short = forward(case, inputs)
            dropped = self.dropped(case, guide, 5)
            tokens = inputs["attention_mask"].bool()
            with hidden_from(case, [(layer, dropped)], tokens):
                dense = forward(case, inputs, use_cache=False)
            kept = tokens & ~dropped
            for got, full, stay in zip(short, dense, kept, strict=True):
                torch.testing.assert_close(
                    got[-int(stay.sum()) :], full[stay], rtol=case.close, atol=case.close
                )

    def test_a_batch_is_its_samples(self, case: Case, monkeypatch: Any) -> None:
        guide = self.guided(case, self.prompts, monkeypatch)
        scores = pore.consistency(case.model(), case.inputs(self.prompts), guide, keep=4)
        for row, tokens in enumerate(self.prompts):
            one = self.guided(case, [tokens], monkeypatch)
            part = guide.select([row])
            torch.testing.assert_close(part.importance, one.importance, rtol=1e-4, atol=1e-4)
            assert torch.equal(part.sequences, one.sequences)
            alone_score = pore.consistency(case.model(), case.inputs([tokens]), one, keep=4)
            torch.testing.assert_close(scores[row], alone_score[0], rtol=1e-3, atol=0.0)

    def test_consistency(self, case: Case, monkeypatch: Any) -> None:
        inputs, model = case.inputs(self.prompts), case.model()
        guide = self.guided(case, self.prompts, monkeypatch)
        got = pore.consistency(model, inputs, guide, keep=4)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, STEPS - 1), value=1)
        ids = torch.cat([inputs["input_ids"], guide.sequences[:, :-1]], 1)
        more = case.answered(ids, mask, STEPS - 1)
        full = {**inputs, "input_ids": ids, "attention_mask": mask, **more}
        dropped = torch.nn.functional.pad(self.dropped(case, guide, 4), (0, STEPS - 1))
        with hidden_from(case, [(0, dropped)], mask.bool()):
            logits = forward(case, full, use_cache=False)[:, -STEPS:]
        expected = logits.softmax(-1).gather(-1, guide.sequences[..., None])[..., 0].prod(1)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=0.0)


class TestConsistency:
    @pytest.mark.parametrize("attention", ["sdpa", "flash_test"])
    @pytest.mark.parametrize("images", [False, True])
    def test_is_the_product_of_probabilities_with_few_tokens(
        self, small: Any, guide: pore.Guide, attention: str, images: bool
    ) -> None:
        """Against a dense pass over prompt and answer in which the dropped tokens are masked."""
        inputs, model = batch(PROMPTS), with_attention(small, attention)
        answers = guide.sequences
        if images:  # a placeholder that the model answers with is no image
            answers = answers.clone()
            answers[:, ::2] = IMAGE
            guide = dataclasses.replace(guide, sequences=answers)
        got = pore.consistency(model, inputs, guide, keep=0.2)
        keep = top_k(guide.importance, [3] * 3, guide.valid)
        dropped = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for image, kept in zip(guide.images, keep, strict=True):
            dropped[image.row, [c for c, k in zip(image.columns, kept, strict=True) if not k]] = (
                True
            )
        tokens, width = inputs["attention_mask"], inputs["input_ids"].shape[1]
        full = dict(inputs, input_ids=torch.cat([inputs["input_ids"], answers[:, :-1]], 1))
        full["attention_mask"] = torch.nn.functional.pad(tokens, (0, STEPS - 1), value=1)
        full["position_ids"] = (full["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        layers = small.model.language_model.layers
        with torch.no_grad(), masked_from(layers, [(0, dropped)], tokens.bool()):
            logits = _forward_text(small, full, width)[:, width - 1 :]
        expected = logits.softmax(-1).gather(-1, answers[..., None])[..., 0].prod(1)
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=0.0)

    def test_with_everything_kept_it_is_the_answer_s_own_probability(
        self, small: Any, guide: pore.Guide
    ) -> None:
        got = pore.consistency(small, batch(PROMPTS), guide, keep=1.0)
        torch.testing.assert_close(got, guide.confidence.double() ** STEPS, rtol=1e-5, atol=0.0)

    def test_answers_of_one_token(self, small: Any) -> None:
        inputs = batch(PROMPTS)
        one = pore.guide(small, inputs, max_new_tokens=1)
        got = pore.consistency(small, inputs, one, keep=1.0)
        torch.testing.assert_close(got, one.confidence.double(), rtol=1e-5, atol=0.0)


class TestEarlyExit:
    def test_answers_stand_from_the_threshold_on(self, guide: pore.Guide) -> None:
        agreement = torch.tensor([0.0, 0.5, 1.0])
        sure = dataclasses.replace(guide, confidence=torch.tensor([0.5, 0.5, 0.5]))
        assert pore.early_exit(sure, agreement, 0.5).tolist() == [False, True, True]
        least = pore.early_exit(sure, agreement, 0.5, torch.minimum)
        assert least.tolist() == [False, True, True]
        assert pore.early_exit(sure, agreement, 0.51, torch.minimum).tolist() == [False] * 3

    def test_the_whole_way(self, small: Any, large: Any, guide: pore.Guide) -> None:
        """Answers of the small model that stand, and the large one asked the rest."""
        inputs = batch(PROMPTS)
        agreement = pore.consistency(small, inputs, guide, keep=2)
        middle = float(((guide.confidence + agreement) / 2).median())
        sure = pore.early_exit(guide, agreement, middle)
        assert sure.sum() == 2
        (row,) = (~sure).nonzero()[:, 0].tolist()
        with torch.no_grad(), pore.SGL(4, layer=2, guide=guide.select([row]))(large):
            large.generate(**alone(PROMPTS, inputs, row), max_new_tokens=2, do_sample=False)


class TestBadInput:
    def test_other_prompts(self, large: Any, guide: pore.Guide) -> None:
        with (
            pore.SGL(4, layer=2, guide=guide)(large),
            pytest.raises(InputError, match="same batch of prompts"),
        ):
            large(**batch(PROMPTS[2:]))

    def test_images_of_other_sizes(self, large: Any, guide: pore.Guide) -> None:
        visual = torch.zeros(1, 20, dtype=torch.bool)
        visual[0, 2:14] = True
        with pore.SGL(4, layer=2, guide=guide.select([2]))(large) as run:
            run.mark_visual(visual)
            with pytest.raises(InputError, match="12 visual tokens, but had 16"):
                large(inputs_embeds=torch.randn(1, 20, 32, dtype=torch.float64))

    @pytest.mark.parametrize("layer", [-1, 5, True])
    def test_layer_out_of_range(self, large: Any, guide: pore.Guide, layer: Any) -> None:
        with (
            pytest.raises(BudgetError, match="choose 0 to 4"),
            pore.SGL(4, layer=layer, guide=guide)(large),
        ):
            pass

    @pytest.mark.parametrize("keep", [0, 1.5, "4"])
    def test_keep_without_meaning(self, guide: pore.Guide, keep: Any) -> None:
        with pytest.raises(BudgetError, match="keep"):
            pore.SGL(keep, layer=2, guide=guide)
