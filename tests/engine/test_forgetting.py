"""Stages that forget: tokens after the prompt see in no layer what was dropped in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import pore
from cases import CASES
from cases.base import TEXT, Case
from helpers.caches import as_argument
from helpers.families import PROMPTS
from helpers.models import batch, prompt, tiny_llava
from pore._compat.caches import cache_in
from pore.engine.records import record_of
from pore.errors import ModelStateError, UnsupportedModelError
from pore.families.registry import family_of

METHOD = pore.CLSE((9, 6, 4), (1, 2, 4), faithful=True)
FAMILIES = ["LLaVA-1.5", "LLaVA-NeXT", "Qwen2.5-VL", "Gemma 3", "InternVL", "SmolVLM"]


def decoded(model: Any, cache: Any, words: list[int], start: int, rows: int = 1) -> Tensor:
    """(rows, n, V) logits of words, one by one, at the positions from `start` on."""
    steps = []
    for i, word in enumerate(words):
        given = {"input_ids": torch.full((rows, 1), word)}
        given["position_ids"] = torch.full((rows, 1), start + i)
        steps.append(model(**given, **as_argument(cache)).logits[:, -1])
    return torch.stack(steps, 1)


def cut(cache: Any, run: pore.Run, first: int) -> DynamicCache:
    """The cache whose every layer holds what the last one does, cut out by hand.

    Args:
        cache: After the prefill.
        run: The run.
        first: Where the image begins.
    """
    (image,) = run.report.samples[0].images
    total = cache.layers[0].keys.shape[2]
    text = [i for i in range(total) if not first <= i < first + image.seen]
    last = torch.tensor(sorted([*text, *(first + i for i in image.kept)]))
    made = DynamicCache()
    for number, layer in enumerate(cache.layers):
        stages = [kept for start, kept in image.stages if start <= number]
        here = stages[-1] if stages else range(image.seen)
        held = torch.tensor(sorted([*text, *(first + i for i in here)]))
        stays = torch.isin(held, last)
        made.update(layer.keys[:, :, stays].clone(), layer.values[:, :, stays].clone(), number)
    return made


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_later_tokens_see_what_a_cut_cache_holds(attention: str) -> None:
    model, inputs, words = tiny_llava(attention=attention), batch([prompt(3, 1, 5)]), [4, 9, 2]
    first, length = int((inputs["input_ids"][0] == 90).nonzero()[0]), inputs["input_ids"].shape[1]
    with torch.no_grad():
        with METHOD(model) as run:
            cache = cache_in(model(**inputs, use_cache=True))
            by_hand = cut(cache, run, first)
            got = decoded(model, cache, words, length)
        with pore.CLSE(METHOD.keep, METHOD.layers)(model):
            kept = cache_in(model(**inputs, use_cache=True))
            other = decoded(model, kept, words, length)
        expected = decoded(model, by_hand, words, length)
    close = 1e-9 if attention == "sdpa" else 1e-5  # eager attention has its softmax in float32
    torch.testing.assert_close(got, expected, rtol=close, atol=close)
    assert not torch.allclose(got, other, rtol=1e-2, atol=1e-2)


def answers(case: Case, prompts: Any, **more: Any) -> Tensor:
    """(B, 4, V) logits of an answer of four words."""
    model, inputs = case.model(), case.inputs(prompts, "left")
    words = range(model.config.get_text_config().vocab_size)
    with torch.no_grad(), METHOD(model):
        out = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            suppress_tokens=sorted(set(words) - set(TEXT)),
            output_logits=True,
            return_dict_in_generate=True,
            **more,
        )
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_its_samples(name: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    prompts = PROMPTS["ragged"]
    together = answers(case, prompts)
    for row, one in enumerate(prompts):
        alone = answers(case, [one])[0]
        torch.testing.assert_close(together[row], alone, rtol=case.close, atol=case.close)


def test_a_static_cache_is_as_good() -> None:
    (case,) = (case for case in CASES if case.name == "LLaVA-1.5")
    expected = answers(case, PROMPTS["ragged"])
    got = answers(case, PROMPTS["ragged"], cache_implementation="static", disable_compile=True)
    torch.testing.assert_close(got, expected, rtol=case.close, atol=case.close)


def test_beams_and_drafts_follow() -> None:
    """Rows that are repeated and reordered, and tokens that are taken back."""
    (case,) = (case for case in CASES if case.name == "LLaVA-1.5")
    model, inputs = case.model(), case.inputs(PROMPTS["single"])
    settings = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad(), METHOD(model):
        greedy = model.generate(**inputs, **settings)
        drafted = model.generate(**inputs, **settings, prompt_lookup_num_tokens=2)
        beams = model.generate(**inputs, **settings, num_beams=2, num_return_sequences=2)
    assert torch.equal(greedy, drafted)
    assert len(beams) == 2


def test_a_second_image_of_a_conversation_is_forgotten_too() -> None:
    model, first, second = tiny_llava(), batch([prompt(3, 1, 5)]), batch([prompt(2, 1, 3)])
    with torch.no_grad(), METHOD(model):
        cache = cache_in(model(**first, use_cache=True))
        past = first["input_ids"].shape[1]
        mask = nn.functional.pad(second["attention_mask"], (past, 0), value=1)
        model(**{**second, "attention_mask": mask}, **as_argument(cache))
        record = record_of(cache)
        assert record is not None
        total = past + second["input_ids"].shape[1]
        for track in record.tracks.values():
            assert int(track.valid.sum()) == total - 2 * (16 - 4)
        following = torch.nn.functional.pad(mask, (0, 1), value=1)
        model(input_ids=torch.tensor([[4]]), attention_mask=following, **as_argument(cache))


def test_what_lacks_nothing_can_go_on_anywhere() -> None:
    model, whole = tiny_llava(), pore.CLSE((1.0, 1.0), (1, 2), faithful=True)
    for given, method in ((batch([prompt(3, 1, 5)]), whole), (batch([[5, 6, 7]]), METHOD)):
        with torch.no_grad():
            expected = model(**given, use_cache=True)
            with method(model):
                out = model(**given, use_cache=True)
            got, plain = (
                model(input_ids=torch.tensor([[4]]), **as_argument(cache_in(one))).logits
                for one in (out, expected)
            )
        torch.testing.assert_close(got, plain, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        with METHOD(model):
            out = model(**batch([prompt(3, 1, 5)]), use_cache=True)
        with pytest.raises(ModelStateError, match="lacks visual tokens"):
            model(input_ids=torch.tensor([[4]]), **as_argument(cache_in(out)))


def test_recurrent_states_forget_nothing() -> None:
    (case,) = (case for case in CASES if case.name == "Qwen3.5")
    family, model = family_of(case.model()), case.model()
    layers = family.layers(model)
    first = next(i for i, layer in enumerate(layers) if not family.recurrent(layer))
    with pytest.raises(UnsupportedModelError, match="which recurrent layers cannot"):
        pore.CLSE(0.5, (first + 1,), faithful=True)(model).__enter__()
