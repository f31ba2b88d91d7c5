"""The report says what was kept."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import torch

import pore
from helpers.engine import BATCHES, K
from helpers.models import N, batch, prompt


class TestReport:
    def test_names_what_was_kept(self, models: Any) -> None:
        model, inputs = models["sdpa"], batch(BATCHES["no image in one row"])
        with pore.FastV(keep=5, layer=K)(model) as run:
            model(**inputs)
        two, none, one = run.report
        assert [image.seen for image in two.images] == [N, N]
        assert none.images == ()
        assert none.tokens == (13,) * 5
        assert one.tokens == (18, 18, 7, 7, 7)
        assert one.unpruned == (18,) * 5
        assert one.mean_visual_tokens == (2 * 16 + 3 * 5) / 5
        assert one.flops < one.unpruned_flops
        image = one.images[0]
        assert image.kept == tuple(sorted(image.kept))
        assert len(set(image.kept)) == 5
        assert image.coordinates == tuple((i // 4, i % 4) for i in image.kept)
        text = str(run.report)
        assert "16 -> 5" in text
        assert "18 (0-1), 7 (2-4)" in text
        assert "none" in text
        record = json.loads(run.report.to_json())
        assert record["samples"][2]["images"][0]["kept"] == list(image.kept)

    def test_prompts_without_image_say_so(self, models: Any) -> None:
        model, inputs = models["sdpa"], batch([prompt(9, 0, 4)])
        dense = model(**inputs).logits
        with pore.FastV(keep=5)(model) as run:
            assert str(run.report) == "FastV: no prefill yet"
            assert torch.equal(model(**inputs).logits, dense)
        assert "No prompt had visual tokens" in str(run.report)

    def test_random_does_not_depend_on_batches(self, models: Any) -> None:
        model, prompts = models["sdpa"], [prompt(3, 1, 5), prompt(3, 1, 5, 1)]
        inputs = batch(prompts)
        with pore.Random(keep=5)(model) as together:
            model(**inputs)
        with pore.Random(keep=5)(model) as singles:
            for row in range(2):
                model(
                    input_ids=inputs["input_ids"][row : row + 1],
                    pixel_values=inputs["pixel_values"][row : row + 1],
                )
        kept = [[sample.images for sample in run.report] for run in (together, singles)]
        assert kept[0] == kept[1]
        assert kept[0][0] != kept[0][1]

    def test_a_prefill_is_read_once_and_let_go_of(self, models: Any) -> None:
        model, inputs = models["sdpa"], batch([prompt(3, 1, 5), prompt(2, 1, 6)])
        with pore.FastV(keep=5, layer=K)(model) as run:
            model(**inputs)
            (prefill,) = run.report._prefills
            tokens = weakref.ref(prefill.tokens)
            del prefill
            first = run.report.samples
            gc.collect()
            assert tokens() is None
            model(**inputs)
            again = run.report.samples
        assert again[:2] == first
        assert [sample.sample for sample in again] == [0, 1, 2, 3]
        assert again[2].images == first[0].images
        assert len(run.report) == 4
