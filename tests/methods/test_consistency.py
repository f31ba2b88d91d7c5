"""How sure a small model is of its answers with few visual tokens, and which of them stand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import pore
from helpers.engine import _forward_text
from helpers.guiding import PROMPTS, STEPS, alone, with_attention
from helpers.models import IMAGE, batch
from helpers.reference import masked_from
from pore.tensors.selection import top_k


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
