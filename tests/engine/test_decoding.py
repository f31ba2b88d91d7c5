"""Cached decoding, and `generate` in all its ways, over a pruned prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import pore
from helpers.caches import as_argument
from helpers.engine import BATCHES, METHODS, WITHOUT_DROPPED, K, _forward_text, tolerance
from helpers.models import IMAGE, N, batch, prompt
from helpers.reference import dropped_columns, masked_from
from pore._compat.caches import cache_in


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_test"])
@pytest.mark.parametrize("pruner", METHODS)
@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES.keys())
def test_cached_decode_equals_full_forward(
    models: Any, prompts: Any, pruner: Any, attention: str
) -> None:
    model, inputs = models[attention], batch(prompts)
    with pruner(model) as run:
        out = model.generate(
            **inputs,
            max_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        lengths = [layer.get_seq_length() for layer in cache_in(out).layers]
    steps = torch.stack(out.logits, 1)
    # The cache is short above the pruned layer, and long below it.
    longest = max(sample.tokens[-1] for sample in run.report)
    width = inputs["input_ids"].shape[1]
    assert lengths == [width + 4] * pruner.layer + [longest + 4] * (5 - pruner.layer)

    full = dict(inputs, input_ids=out.sequences[:, :-1])
    full["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    full["position_ids"] = (full["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    dropped = dropped_columns(run, inputs["input_ids"], IMAGE)
    reference, tokens = models["sdpa"], inputs["attention_mask"]
    with masked_from(reference.model.language_model.layers, [(pruner.layer, dropped)], tokens):
        # A generated placeholder is no image: give the model the features by hand.
        dense = _forward_text(reference, full, width)
    # `generate` hands logits out in float32.
    expected = dense[:, width - 1 :].float()
    torch.testing.assert_close(steps, expected, **tolerance(attention, torch.float32))


class TestGenerate:
    """Every way of generating gives what the plain one gives."""

    inputs = batch(BATCHES["no image in one row"])

    def plain(self, model: Any, pruner: Any, **kwargs: Any) -> Tensor:
        with pruner(model):
            out: Tensor = model.generate(**self.inputs, max_new_tokens=6, do_sample=False, **kwargs)
        return out

    @pytest.mark.parametrize("pruner", [pore.FastV(keep=5), *WITHOUT_DROPPED], ids=repr)
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_static_cache(self, models: Any, attention: str, pruner: Any) -> None:
        model = models[attention]
        expected = self.plain(model, pruner)
        assert torch.equal(self.plain(model, pruner, cache_implementation="static"), expected)

    def test_static_cache_of_the_caller_is_used_again_after_reset(self, models: Any) -> None:
        model, pruner = models["sdpa"], pore.FastV(keep=5)
        cache = StaticCache(config=model.config.text_config, max_cache_len=96)
        expected = self.plain(model, pruner)
        with pruner(model):
            for _ in range(2):
                out = model.generate(
                    **self.inputs, max_new_tokens=6, do_sample=False, **as_argument(cache)
                )
                assert torch.equal(out, expected)
                cache.reset()

    @pytest.mark.parametrize("pruner", [pore.FastV(keep=5), pore.Downsample(keep=4)], ids=repr)
    def test_beams_equal_beams_one_by_one(self, models: Any, pruner: Any) -> None:
        model = models["sdpa"]
        with pruner(model):
            together = model.generate(
                **self.inputs,
                max_new_tokens=6,
                do_sample=False,
                num_beams=3,
                output_scores=True,
                return_dict_in_generate=True,
            )
        first = 0
        for row, ids in enumerate(BATCHES["no image in one row"]):
            images = ids.count(IMAGE) // N
            one: dict[str, Any] = {"input_ids": torch.tensor([ids])}
            if images:
                one["pixel_values"] = self.inputs["pixel_values"][first : first + images]
                first += images
            with pruner(model):
                alone = model.generate(
                    **one,
                    max_new_tokens=6,
                    do_sample=False,
                    num_beams=3,
                    output_scores=True,
                    return_dict_in_generate=True,
                )
            assert torch.equal(together.sequences[row, -6:], alone.sequences[0, -6:])
            torch.testing.assert_close(
                together.sequences_scores[row],
                alone.sequences_scores[0],
                **tolerance("sdpa", torch.float32),
            )

    def test_sampling_draws_from_the_pruned_distribution(self, models: Any) -> None:
        model, inputs = models["sdpa"], batch(BATCHES["ragged text"])
        options = {"output_logits": True, "return_dict_in_generate": True}
        with pore.FastV(keep=5)(model):
            torch.manual_seed(7)
            drawn = model.generate(
                **inputs, max_new_tokens=6, do_sample=True, num_return_sequences=2, **options
            )
            greedy = model.generate(**inputs, max_new_tokens=1, do_sample=False, **options)
        close = tolerance("sdpa", torch.float32)
        torch.testing.assert_close(drawn.logits[0][::2], greedy.logits[0], **close)
        torch.testing.assert_close(drawn.logits[0][1::2], greedy.logits[0], **close)

    def test_assisted_decoding_takes_rejected_tokens_back(self, models: Any) -> None:
        model = models["sdpa"]
        one = batch([prompt(3, 1, 5)])
        with pore.FastV(keep=5)(model) as run:
            expected = model.generate(**one, max_new_tokens=12, do_sample=False)
            out = model.generate(
                **one, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3
            )
        assert torch.equal(out, expected)
        assert run.report.samples[1].tokens == run.report.samples[0].tokens

    @pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_test"])
    @pytest.mark.parametrize("pruner", [pore.FastV(keep=5), *WITHOUT_DROPPED], ids=repr)
    def test_decoding_after_right_padding(self, models: Any, attention: str, pruner: Any) -> None:
        model, prompts = models[attention], BATCHES["ragged text"]
        inputs, steps = batch(prompts, "right"), torch.tensor([[7, 8, 9], [4, 5, 6]])
        mask, lengths = inputs["attention_mask"], inputs["attention_mask"].sum(1, keepdim=True)
        with pruner(model):
            cache = cache_in(model(**inputs))
            together = []
            for step in range(3):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                out = model(
                    input_ids=steps[:, step : step + 1],
                    attention_mask=mask,
                    position_ids=lengths + step,
                    **as_argument(cache),
                )
                together.append(out.logits[:, 0])
        for row, ids in enumerate(prompts):
            pixels = inputs["pixel_values"][row : row + 1]
            with pruner(model):
                cache = cache_in(model(input_ids=torch.tensor([ids]), pixel_values=pixels))
                for step in range(3):
                    alone = model(
                        input_ids=steps[row : row + 1, step : step + 1], **as_argument(cache)
                    )
                    torch.testing.assert_close(
                        together[step][row], alone.logits[0, 0], **tolerance(attention)
                    )

    def test_without_a_cache_the_newest_token_chooses_anew(self, models: Any) -> None:
        model, pruner = models["sdpa"], pore.FastV(keep=5)
        one = batch([prompt(3, 1, 5)])
        with pruner(model) as run:
            out = model.generate(**one, max_new_tokens=3, do_sample=False, use_cache=False)
        assert len(run.report) == 3
        ids = one["input_ids"]
        for _step in range(3):
            with pruner(model):
                logits = model(input_ids=ids, pixel_values=one["pixel_values"]).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(out, ids)

    def test_a_conversation_goes_on_over_the_pruned_cache(self, models: Any) -> None:
        """What was dropped stays dropped; a second image is pruned for itself."""
        model = models["sdpa"]
        first, second = prompt(3, 1, 5), prompt(2, 1, 4, 1)
        pixels = batch([first, second])["pixel_values"]
        with pore.FastV(keep=5, layer=K)(model) as run:
            cache = DynamicCache(config=model.config.text_config)
            model(input_ids=torch.tensor([first]), pixel_values=pixels[:1], **as_argument(cache))
            out = model(
                input_ids=torch.tensor([second]), pixel_values=pixels[1:], **as_argument(cache)
            ).logits
            text = model(input_ids=torch.tensor([[9, 8, 7]]), **as_argument(cache)).logits
        ids = torch.tensor([first + second + [9, 8, 7]])
        kept = [set(sample.images[0].kept) for sample in run.report.samples[:2]]
        dropped = torch.zeros_like(ids, dtype=torch.bool)
        for number, start in enumerate((3, len(first) + 2)):
            for i in range(N):
                dropped[0, start + i] = i not in kept[number]
        everything = torch.ones_like(ids)
        with masked_from(model.model.language_model.layers, [(K, dropped)], everything):
            dense = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits[0]
        stay = ~dropped[0, len(first) : len(first) + len(second)]
        middle = dense[len(first) : len(first) + len(second)]
        torch.testing.assert_close(out[0], middle[stay], **tolerance("sdpa"))
        torch.testing.assert_close(text[0], dense[-3:], **tolerance("sdpa"))
