"""Marks of visual tokens, a cache that is used again, and a prefill that fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import StaticCache

import pore
from helpers.caches import as_argument
from helpers.given import CLOSE, ELSEWHERE
from helpers.methods import DRAWING, EVERY, KEEP, model_of, usual
from helpers.models import IMAGE, batch, prompt
from pore.errors import InputError


@pytest.mark.parametrize("wrong", [-3, 4])
@pytest.mark.parametrize("name", [n for n in ELSEWHERE if n not in ("CDPruner",)])
def test_marks_of_another_length_are_refused(name: str, wrong: int) -> None:
    model, inputs = model_of(), batch([prompt(5, 1, 6)])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    marks = inputs["input_ids"] == IMAGE
    marks = marks[:, -wrong:] if wrong < 0 else nn.functional.pad(marks, (0, wrong))
    with torch.no_grad(), usual(name, KEEP)(model) as run:
        run.mark_visual(marks)
        with pytest.raises(InputError, match="mark every prompt before it is given"):
            model(inputs_embeds=embeds)


def test_marks_hold_for_an_answer_without_a_cache() -> None:
    """Then the prompt comes again with every token; another one that is as long is refused."""
    model, inputs = model_of(), batch([prompt(5, 1, 6)])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    more = model.get_input_embeddings()(torch.tensor([[7, 8]]))
    with torch.no_grad(), pore.DivPrune(KEEP)(model) as run:
        run.mark_visual(inputs["input_ids"] == IMAGE)
        model(inputs_embeds=embeds, use_cache=False)
        model(inputs_embeds=torch.cat([embeds, more], 1), use_cache=False)
        first, second = run.report
        assert first.images == second.images
        assert second.tokens[-1] == first.tokens[-1] + 2
        with pytest.raises(InputError, match="mark every prompt before it is given"):
            model(inputs_embeds=torch.cat([more, embeds], 1), use_cache=False)


@pytest.mark.parametrize("name", EVERY)
def test_a_static_cache_that_was_reset(name: str) -> None:
    """Then a prompt of one token, which sees nothing but itself."""
    model, inputs = model_of(), batch([prompt(3, 1, 5)])
    new = {"input_ids": torch.tensor([[7]]), "position_ids": torch.tensor([[0]])}
    expected = model(**new).logits
    cache = StaticCache(config=model.config.text_config, max_cache_len=60)
    with torch.no_grad(), usual(name, KEEP)(model):
        model(**inputs, **as_argument(cache))
        model(input_ids=torch.tensor([[5]]), **as_argument(cache))
        cache.reset()
        got = model(**new, **as_argument(cache)).logits
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("name", EVERY)
def test_a_prefill_that_fails_is_not_in_the_report(name: str) -> None:
    """Wherever it does: the answers go with the entries of the report."""
    model, inputs = model_of(), batch([prompt(3, 1, 5)])
    decoder = model.model.language_model

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    places = [
        *(model.model.vision_tower, model.model.multi_modal_projector, decoder.layers[0]),
        *(decoder.layers[-1].mlp, decoder.norm, model.lm_head),
    ]
    with torch.no_grad(), usual(name, KEEP)(model) as run:
        model(**inputs)
        for place in places:
            hook = place.register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                model(**inputs)
            hook.remove()
            assert len(run.report) == len(run.report.samples) == 1
        model(**inputs)
        model.model(**inputs)  # without its head
    assert len(run.report) == len(run.report.samples) == 3
    assert run.report.samples[0].images == run.report.samples[1].images or name in DRAWING
