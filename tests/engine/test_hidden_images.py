"""Visual tokens that the attention mask hides are no tokens to choose among."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.given import CLOSE, ELSEWHERE, IN_DECODER, IN_TOWER, run_of
from helpers.methods import DRAWING, KEEP, LAYERS, model_of, usual
from helpers.models import IMAGE, N, batch, prompt
from helpers.reference import dropped_by_stage, masked_from
from pore.errors import BudgetError, InputError


class TestHidden:
    """Visual tokens that the attention mask hides are no candidates."""

    def inputs(self) -> tuple[Any, set[int]]:
        inputs = batch([prompt(3, 2, 5), prompt(4, 1, 3, 1)])
        visual = (inputs["input_ids"][0] == IMAGE).nonzero().flatten().tolist()
        shown = {1, 2, 5, 7, 8, 11, 12, 15}
        for raster in set(range(N)) - shown:
            inputs["attention_mask"][0, visual[raster]] = 0
        return inputs, shown

    @pytest.mark.parametrize("name", [n for n in ELSEWHERE if n != "Downsample"])
    def test_what_is_kept_was_shown(self, name: str) -> None:
        inputs, shown = self.inputs()
        logits, run = run_of(name, inputs)
        first, second = run.report.samples[0].images
        assert set(first.kept) <= shown
        assert (len(first.kept) + first.extra, first.hidden, first.seen) == (KEEP, N - 8, N)
        assert (len(second.kept) + second.extra, second.hidden) == (KEEP, 0)
        assert logits.shape[1] == max(sample.tokens[-1] for sample in run.report)
        counts = usual(name, KEEP).counts(N, LAYERS)
        assert run.report.samples[1].mean_visual_tokens == pytest.approx(sum(counts) / LAYERS)

    @pytest.mark.parametrize("name", [n for n in IN_DECODER if n not in DRAWING])
    def test_equals_masked_dense(self, name: str) -> None:
        inputs, _ = self.inputs()
        short, run = run_of(name, inputs)
        tokens = inputs["attention_mask"].bool()
        stages = dropped_by_stage(run, inputs["input_ids"] == IMAGE)
        layers = model_of().model.language_model.layers
        with torch.no_grad(), masked_from(layers, stages, tokens):
            dense = model_of()(**inputs, use_cache=False).logits
        kept = tokens & ~stages[-1][1]
        # Hidden tokens lie inside the sequence; what is left of every sample ends together.
        for row, got in enumerate(short):
            count = int(kept[row].sum())
            torch.testing.assert_close(got[-count:], dense[row, kept[row]], **CLOSE)

    @pytest.mark.parametrize("name", [n for n in ELSEWHERE if n != "Downsample"])
    def test_more_than_is_shown_is_refused(self, name: str) -> None:
        inputs, _ = self.inputs()
        with pytest.raises(BudgetError, match="8"):
            run_of(name, inputs, keep=9)

    @pytest.mark.parametrize("name", IN_TOWER)
    def test_the_tower_knows_of_no_mask(self, name: str) -> None:
        inputs, _ = self.inputs()
        with pytest.raises(InputError, match="in the vision tower, which knows of no mask"):
            run_of(name, inputs)

    @pytest.mark.parametrize("name", ELSEWHERE)
    def test_an_image_that_is_hidden_is_not_there(self, name: str) -> None:
        inputs = batch([prompt(3, 1, 5)])
        inputs["attention_mask"][inputs["input_ids"] == IMAGE] = 0
        with torch.no_grad():
            expected = model_of()(**inputs).logits
        logits, run = run_of(name, inputs)
        assert torch.equal(logits, expected)
        assert run.report.samples[0].images == ()
        assert run.report.samples[0].tokens == (8,) * LAYERS
