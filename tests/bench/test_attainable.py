"""The attainable does what a pruned prefill does; the rates are a device's."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlavaForConditionalGeneration

from helpers.bench import AFTER, BEFORE, FASTV, LAYERS, PROMPT, SHORT, K, untouched
from helpers.caches import as_argument
from helpers.models import N, batch, prompt, tiny_llava
from pore.bench.attainable import Attainable, cuts_of
from pore.bench.rates import device_rates


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_attainable_does_the_same_work(attention: str, rows: int) -> None:
    """Given the positions that a pruner keeps, it gives the pruner's logits, and decodes them."""
    model = tiny_llava(layers=LAYERS, attention=attention)
    inputs = batch([prompt(BEFORE, 1, AFTER)] * rows)
    inputs["pixel_values"] = inputs["pixel_values"][:1].expand(rows, -1, -1, -1)
    token = torch.full((rows, 1), 7)

    def logits() -> list[Tensor]:
        cache = DynamicCache(config=model.config.text_config)
        found = [model(**inputs, **as_argument(cache)).logits[:, -1]]
        mask = inputs["attention_mask"]
        for _ in range(2):
            mask = nn.functional.pad(mask, (0, 1), value=1)
            step = model(input_ids=token, attention_mask=mask, **as_argument(cache))
            found.append(step.logits[:, -1])
        lengths = [layer.keys.shape[-2] for layer in cache.layers]
        assert lengths == [PROMPT + 2] * K + [SHORT + 2] * (LAYERS - K)
        return found

    with torch.inference_mode():
        with FASTV(model) as run:
            pruned = logits()
        kept = run.report.samples[0].images[0].kept
        text = [*range(BEFORE), *range(BEFORE + N, PROMPT)]
        index = torch.tensor(sorted([*text, *(BEFORE + i for i in kept)]))
        with Attainable(model.model.language_model, {K: index}):
            attained = logits()
    error = 1e-5 if attention == "eager" else 1e-9
    for one, other in zip(pruned, attained, strict=True):
        torch.testing.assert_close(one, other, rtol=error, atol=error)
    assert untouched(model)


def test_the_attainable_is_left_by_an_exception(model: LlavaForConditionalGeneration) -> None:
    with pytest.raises(KeyError), Attainable(model.model.language_model, {}):
        raise KeyError
    assert untouched(model)


def test_cuts_keep_the_last_token() -> None:
    cuts = cuts_of((30, 30, 12, 12, 5), 30, torch.device("cpu"))
    assert {layer: len(index) for layer, index in cuts.items()} == {2: 12, 4: 5}
    for index, before in ((cuts[2], 30), (cuts[4], 12)):
        assert index[0] == 0
        assert index[-1] == before - 1
        assert all(a < b for a, b in pairwise(index.tolist()))


@pytest.mark.slow
def test_rates_are_those_of_a_product_and_a_copy() -> None:
    rates = device_rates(torch.device("cpu"), torch.float32)
    assert rates.flops > 0
    assert rates.bandwidth > 0
