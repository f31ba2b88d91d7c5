"""SparseVLM: what ranks the tokens, and how many an attention's rank leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pore
from helpers.models import N, batch, prompt, tiny_llava
from helpers.sparsevlm import (
    PROMPTS,
    P,
    lengths,
    pruner,
    raters,
    stages_of,
)
from pore.bias.rope import ROPE_FLOOR, rope_prior
from pore.errors import BudgetError, ProfileMismatchError
from pore.methods._sparsevlm import (
    Rated,
    clusters,
)
from pore.tensors.selection import top_k


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava(layers=6)


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
