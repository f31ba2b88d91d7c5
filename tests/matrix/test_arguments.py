"""Every argument of a forward and of `generate` is in docs/arguments.md, and does what it says."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, TextIteratorStreamer

import pore
from cases import CASES, COUSINS
from cases.base import since
from helpers.methods import DRAWING, EVERY, KEEP, model_of, usual
from helpers.models import IMAGE, batch, prompt, tiny_llava
from pore.errors import InputError

PAGE = Path(__file__).parents[2] / "docs" / "arguments.md"
THREE = ("FastV", "PyramidDrop", "DivPrune", "VisionZip")
# What acts on the logits that come out, or on what is made of them.
OF_LOGITS = """
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
    assistant_lookbehind bad_words_ids begin_suppress_tokens bos_token_id compile_config
    constraints continuous_batching_config decoder_start_token_id disable_compile
    diversity_penalty dola_layers early_stopping encoder_no_repeat_ngram_size
    encoder_repetition_penalty eos_token_id epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty force_words_ids forced_bos_token_id forced_eos_token_id
    generation_kwargs is_assistant length_penalty low_memory max_cache_len
    max_matching_ngram_size max_time min_length min_new_tokens min_p no_repeat_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule num_beam_groups output_attentions
    output_hidden_states pad_token_id penalty_alpha remove_invalid_values renormalize_logits
    repetition_penalty return_dict_in_generate sequence_bias speculation_type stop_strings
    suppress_tokens target_lookbehind temperature token_healing top_h top_k top_p
    transformers_version typical_p use_mtp watermarking_config
"""


def named() -> set[str]:
    return set(re.findall(r"`(\w+)`", PAGE.read_text()))


@pytest.mark.parametrize("case", [*CASES, *COUSINS], ids=lambda case: case.name)
def test_every_argument_of_a_forward_is_in_the_table(case: Any) -> None:
    known = {"self", "kwargs", "lm_kwargs", "past_key_values"}
    arguments = set(inspect.signature(type(case.model()).forward).parameters) - known
    assert arguments <= named()


def test_every_argument_of_generate_is_in_the_table() -> None:
    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    settings = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    assert arguments <= named()
    assert settings <= named() | set(OF_LOGITS.split())


@pytest.mark.parametrize("name", [n for n in EVERY if usual(n, KEEP).reads_tower])
def test_another_layer_of_the_tower_is_refused_where_it_is_read(name: str) -> None:
    model, inputs = model_of(), batch([prompt(3, 1, 5)])
    with torch.no_grad(), usual(name, KEEP)(model):
        for more in ({"vision_feature_layer": -1}, {"vision_feature_select_strategy": "full"}):
            with pytest.raises(InputError, match="or set it in the config"):
                model(**inputs, **more)
            with pytest.raises(InputError, match="or set it in the config"):
                model.generate(**inputs, **more, max_new_tokens=1)
        model(**inputs, vision_feature_layer=model.config.vision_feature_layer)


@pytest.mark.parametrize("name", ["FastV", "DivPrune"])
def test_another_layer_of_the_tower_is_honoured_elsewhere(name: str) -> None:
    model, inputs = model_of(), batch([prompt(3, 1, 5)])
    with torch.no_grad(), usual(name, KEEP)(model):
        plain = model(**inputs).logits
        got = model(**inputs, vision_feature_layer=-1).logits
        was = model.config.vision_feature_layer
        try:
            model.config.vision_feature_layer = -1
            expected = model(**inputs).logits
        finally:
            model.config.vision_feature_layer = was
    assert torch.equal(got, expected)
    assert not torch.equal(got, plain)


@pytest.mark.parametrize("name", THREE)
def test_attentions_are_of_the_tokens_that_each_layer_saw(name: str) -> None:
    model, inputs = (
        tiny_llava(layers=8, tower_layers=4, attention="eager"),
        batch([prompt(3, 1, 5)]),
    )
    with torch.no_grad(), usual(name, KEEP)(model) as run:
        out = model(**inputs, output_attentions=True, output_hidden_states=True)
    tokens = run.report.samples[0].tokens
    assert tuple(weights.shape[-1] for weights in out.attentions) == tokens
    assert out.hidden_states[-1].shape[1] == out.logits.shape[1] == tokens[-1]


def settings() -> dict[str, dict[str, Any]]:
    """Settings of `generate` by which the tokens are those of the plain call."""
    return {
        "max_length": {"max_length": 24 + 6},
        "no cache": {"use_cache": False},
        "outputs": {"output_scores": True, "output_logits": True, "return_dict_in_generate": True},
        "drafts": {"prompt_lookup_num_tokens": 3},
        "chunks": {"prefill_chunk_size": 5},
        "static": {"cache_implementation": "static"},
        "static, drafts": {  # transformers itself makes the cache too short for the last drafts
            "cache_implementation": "static",
            "prompt_lookup_num_tokens": 3,
            "max_cache_len": 40,
        },
        "config": {"generation_config": GenerationConfig(max_new_tokens=6, pad_token_id=0)},
        "processors": {"logits_processor": [], "stopping_criteria": []},
    }


@pytest.mark.parametrize("what", settings())
@pytest.mark.parametrize("name", [n for n in EVERY if n not in DRAWING])
@pytest.mark.at_once(12)
def test_generate(name: str, what: str) -> None:
    by_text = usual(name, KEEP).counts(16, 8)[0] == 16 or name in ("CDPruner", "HAWK")
    if what == "no cache" and by_text:
        pytest.skip("every new token is text that has its own say of the image")
    if what == "static, drafts" and not since("5.24"):
        pytest.skip("this transformers itself drafts over dynamic caches alone")
    model, inputs = model_of(), batch([prompt(3, 1, 5)])
    more = settings()[what]
    common = {"do_sample": False, "suppress_tokens": [IMAGE]}
    count = {} if what in ("max_length", "config") else {"max_new_tokens": 6}
    with torch.no_grad(), usual(name, KEEP)(model):
        expected = model.generate(**inputs, **common, max_new_tokens=6)
        got = model.generate(**inputs, **common, **count, **more)
    got = got if isinstance(got, torch.Tensor) else got.sequences
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", THREE)
def test_an_assistant_and_a_negative_prompt(name: str) -> None:
    model, inputs = model_of(), batch([prompt(3, 1, 5)])
    common = {"do_sample": False, "suppress_tokens": [IMAGE], "max_new_tokens": 6}
    with torch.no_grad(), usual(name, KEEP)(model) as run:
        model.generate(**inputs, **common)
        negative = torch.tensor([[5, 6, 7]])
        guided = model.generate(
            **inputs, **common, guidance_scale=1.5, negative_prompt_ids=negative
        )
    assert guided.shape[1] == 24 + 6
    assert [len(sample.images) for sample in run.report] == [1, 1, 0]


def test_a_stream_is_of_the_whole_answer() -> None:
    class Words:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(f"{int(i)} " for i in ids)

    model, inputs = model_of(), batch([prompt(3, 1, 5)])
    common = {"do_sample": False, "suppress_tokens": [IMAGE], "max_new_tokens": 6}
    with torch.no_grad(), pore.FastV(KEEP)(model):
        expected = model.generate(**inputs, **common)[0, 24:].tolist()
        streamer = TextIteratorStreamer(Words(), skip_prompt=True)
        model.generate(**inputs, **common, streamer=streamer)
    assert "".join(streamer).split() == [str(i) for i in expected]
