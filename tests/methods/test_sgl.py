"""SGL: a large model that keeps what a small one looked at."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pore
from cases import CASES
from cases.base import TEXT, Case
from helpers.families import PROMPTS as FAMILY_PROMPTS
from helpers.families import forward, hidden_from
from helpers.guiding import CLOSE, PROMPTS, STEPS, alone, with_attention
from helpers.models import IMAGE, N, batch, prompt, tiny_llava
from helpers.reference import dropped_columns, masked_from
from pore.cost.named import model_shape
from pore.errors import BudgetError, InputError, PoreError
from pore.methods.registry import methods
from pore.tensors.selection import budget, top_k


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

    def test_after_another_method(self, large: Any, guide: pore.Guide) -> None:
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


def in_turn(place: int) -> Any:
    """All families, of which every third runs at every change."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=case.name, marks=() if i % 3 == place else pytest.mark.slow)
            for i, case in enumerate(CASES)
        ],
    )


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

    @in_turn(0)
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

    @in_turn(1)
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

    @in_turn(2)
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
