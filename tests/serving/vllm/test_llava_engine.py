"""vLLM's engine with the plug-in on the embedded model, and with embeddings in place of images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pore
from helpers.chats import picture, user
from helpers.vllm_engines import CHUNK, MAY_NOT_BE_SET, answers, engine, generated, tokens
from pore.data.loading import load_model
from pore.data.prompts import Prompt, build_inputs, prompt_inputs, render, render_messages
from pore.embedded import embedded_model
from pore.engine.embeddings import kept_embeddings
from pore.errors import InputError
from pore.serving.reencoding import Ranker, reencoded
from pore.serving.requests import Limits, conversation
from pore.serving.vllm.client import VLLMClient
from pore.serving.vllm.plugin import MODELS, register

pytest.importorskip("vllm", reason="vLLM has an environment of its own: .ci/vllm")

KEEP = 16
IN_ENGINE = {"method": "VisionZip", "keep": KEEP}
PRUNER = pore.VisionZip(keep=KEEP)
"""It reads keys and attention of the tower, takes CLS along, and merges."""


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    return load_model("embedded")


@pytest.fixture(scope="module")
def served() -> Any:
    return engine(
        embedded_model(),
        enable_mm_embeds=True,
        hf_overrides={
            "architectures": ["PoreLlavaForConditionalGeneration"],
            "pore": IN_ENGINE,
        },
    )


@pytest.fixture(scope="module")
def samples() -> list[Any]:
    found = pore.load_samples("embedded:test")
    return [sample for sample, _ in zip(found, range(12), strict=False)]


def test_being_registered_again_changes_nothing(served: Any) -> None:
    from vllm import ModelRegistry
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load, known = CPUModelRunner.load_model, ModelRegistry.models.copy()
    assert set(MODELS) <= set(known)
    register()
    assert CPUModelRunner.load_model is load
    assert ModelRegistry.models == known


def asked(processor: Any, text: str, *images: Any) -> dict[str, Any]:
    """A prompt for the engine with whole images."""
    read, _ = conversation([user(text, *images)], Limits())
    prompt: dict[str, Any] = {"prompt": render_messages(processor, read)}
    if images:
        prompt["multi_modal_data"] = {"image": list(images)}
    return prompt


def in_transformers(parts: tuple[Any, Any], pruner: Any, text: str, *images: Any) -> list[int]:
    """The answer of transformers to the same prompt, pruned there."""
    model, processor = parts
    read, _ = conversation([user(text, *images)], Limits())
    prompt = Prompt("asked", render_messages(processor, read), images)
    inputs = prompt_inputs(processor, [prompt])
    if not images:
        return generated(model, **inputs)[0]
    with pruner(model):
        return generated(model, **inputs)[0]


def test_answers_are_those_of_transformers(served: Any, parts: Any, samples: Any) -> None:
    """Twelve questions in one batch, prompts in chunks that cut their images."""
    model, processor = parts
    prompts = [
        {"prompt": render(processor, s.question), "multi_modal_data": {"image": s.load_image()}}
        for s in samples
    ]
    outputs = answers(served, prompts)
    expected = []
    for sample in samples:
        with PRUNER(model):
            expected += generated(model, **build_inputs(processor, [sample]))
    assert tokens(outputs) == expected
    lengths = [len(output.prompt_token_ids) for output in outputs]
    assert all(CHUNK < length < 2 * CHUNK for length in lengths)
    assert len({tuple(one) for one in expected}) > 4
    whole = [generated(model, **build_inputs(processor, [sample]))[0] for sample in samples]
    assert whole != expected  # so that an engine that does not prune would be noticed


def test_batches_of_all_kinds(served: Any, parts: Any, samples: Any) -> None:
    """Two images, none, and the same image with another question."""
    _, processor = parts
    one, other = (sample.load_image() for sample in samples[:2])
    texts = [sample.question for sample in samples[:3]]
    cases = [
        (texts[0], one, other),
        (texts[1],),
        (texts[2], one),
        (texts[1], one),
        (texts[0], other),
    ]
    outputs = answers(served, [asked(processor, *case) for case in cases])
    assert tokens(outputs) == [in_transformers(parts, PRUNER, *case) for case in cases]


def test_a_prompt_that_was_there_before_is_cached(served: Any, parts: Any) -> None:
    _, processor = parts
    text = "What is in the middle of this picture? " * 3
    case = (text, picture(11))
    first, again = (answers(served, [asked(processor, *case)])[0] for _ in range(2))
    assert first.num_cached_tokens == 0
    assert again.num_cached_tokens >= 32
    assert tokens([first]) == tokens([again]) == [in_transformers(parts, PRUNER, *case)]
    (other,) = answers(served, [asked(processor, text, picture(12))])
    assert other.num_cached_tokens == 0


def test_embeddings_of_a_ranker_are_encoded_again(served: Any, parts: Any, samples: Any) -> None:
    """FastV chooses outside; the engine answers as transformers with the same embeddings."""
    model, processor = parts
    pruner = pore.FastV(keep=KEEP, layer=2)
    client = VLLMClient(None, Ranker.load("embedded", pruner))
    cases = [(s.question, s.load_image()) for s in samples]
    cases.append((samples[0].question * 3, *(s.load_image() for s in samples[:2])))
    prompts = [client.engine_prompt([user(*case)]) for case in cases]
    mixed = [*prompts, asked(processor, *cases[0])]
    outputs = tokens(answers(served, mixed))
    expected = []
    for text, *images in cases:
        read, _ = conversation([user(text, *images)], Limits())
        prompt = Prompt("asked", render_messages(processor, read), images)
        inputs = prompt_inputs(processor, [prompt])
        kept = kept_embeddings(model, inputs, pruner)
        expected += generated(model, **reencoded(model, inputs, kept))
    assert outputs == [*expected, in_transformers(parts, PRUNER, *cases[0])]
    again = answers(served, prompts[-1:])[0]
    assert again.num_cached_tokens >= 32
    assert tokens([again]) == expected[-1:]


def test_a_request_that_is_refused_leaves_the_engine_alive(served: Any, parts: Any) -> None:
    _, processor = parts
    width = parts[0].config.text_config.hidden_size
    wrong: list[dict[str, Any]] = [
        {
            "prompt": "USER: <image> What?",
            "multi_modal_data": {"image": [torch.zeros(4, width + 1)]},
        },
        {"prompt": "USER: <image> What?", "multi_modal_data": {"image": [torch.zeros(0, width)]}},
        {"prompt": "USER: <image> What?", "multi_modal_data": {"image": ["no picture"]}},
    ]
    for prompt in wrong:
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            answers(served, [prompt])
    case = ("What is this?", picture(13))
    for key, value in MAY_NOT_BE_SET.items():
        with pytest.raises(InputError, match=f"'{key}'"):
            answers(served, [{**asked(processor, *case), "mm_processor_kwargs": {key: value}}])
    outputs = answers(served, [asked(processor, *case)])
    assert tokens(outputs) == [in_transformers(parts, PRUNER, *case)]
