"""vLLM's engine with the plug-in on a tiny LLaVA-NeXT: tiles, ends of rows, padding cut off."""

from __future__ import annotations

from typing import Any

import PIL.Image
import pytest

import pore
from helpers.chats import picture
from helpers.vllm_engines import CHUNK, MAY_NOT_BE_SET, answers, engine, generated, tokens
from helpers.vllm_next import SIDE, save_next
from pore.data.loading import load_model
from pore.data.prompts import Prompt, prompt_inputs
from pore.errors import InputError

pytest.importorskip("vllm", reason="vLLM has an environment of its own: .ci/vllm")

PRUNER = pore.FasterVLM(keep=0.4)
IN_ENGINE = {"method": "FasterVLM", "keep": 0.4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_next(tmp_path_factory.mktemp("next")))


@pytest.fixture(scope="module")
def parts(checkpoint: str) -> tuple[Any, Any]:
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def served(checkpoint: str) -> Any:
    architecture = "PoreLlavaNextForConditionalGeneration"
    return engine(checkpoint, hf_overrides={"architectures": [architecture], "pore": IN_ENGINE})


def sized(seed: int, height: float, width: float) -> PIL.Image.Image:
    """A picture of so many tiles."""
    return picture(seed).resize((round(width * SIDE), round(height * SIDE)))


def words(seed: int, count: int) -> str:
    return "".join(f" w{(17 * seed + 7 * i) % 100}" for i in range(count))


CASES: dict[str, tuple[Any, ...]] = {
    "two tiles": (words(1, 5) + "<image>" + words(2, 6), sized(1, 1, 2)),
    "four tiles": (words(3, 9) + "<image>" + words(4, 6), sized(2, 2, 2)),
    "padding cut off": (words(5, 10) + "<image>" + words(6, 9), sized(3, 0.7, 2.1)),
    "two": (
        words(7, 3) + "<image>" + words(8, 2) + "<image>" + words(9, 4),
        sized(4, 2, 1.2),
        sized(5, 1, 2),
    ),
    "at the start": ("<image>" + words(3, 5), sized(8, 1.7, 2)),
    "text": (words(4, 30),),
}


def asked(text: str, *images: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"prompt": text}
    return {**found, "multi_modal_data": {"image": list(images)}} if images else found


def in_transformers(parts: Any, pruner: Any, text: str, *images: Any) -> list[int]:
    model, processor = parts
    inputs = prompt_inputs(processor, [Prompt("asked", text, images)])
    if pruner is None or not images:
        return generated(model, **inputs)[0]
    with pruner(model):
        return generated(model, **inputs)[0]


def test_answers_are_those_of_transformers(served: Any, parts: Any) -> None:
    """One batch of all kinds, twice: prompts in chunks that cut images, then from the cache."""
    prompts = [asked(*case) for case in CASES.values()]
    first, again = (answers(served, prompts) for _ in range(2))
    expected = [in_transformers(parts, PRUNER, *case) for case in CASES.values()]
    assert dict(zip(CASES, tokens(first), strict=True)) == dict(zip(CASES, expected, strict=True))
    assert tokens(again) == expected
    cached = [output.num_cached_tokens for output in again]
    assert all(hit >= 32 for hit in cached[:4])
    whole = [in_transformers(parts, None, *case) for case in CASES.values()]
    assert sum(a != b for a, b in zip(whole, expected, strict=True)) == len(CASES) - 1
    token = parts[0].config.image_token_index
    left = [output.prompt_token_ids.count(token) for output in first]
    many = [placeholders(parts, *case) for case in CASES.values()]
    assert all(few < 0.7 * all_ for few, all_ in zip(left[:-1], many[:-1], strict=True))
    assert first[1].prompt_token_ids[CHUNK - 1 : CHUNK + 1] == [token, token]


def placeholders(parts: Any, text: str, *images: Any) -> int:
    """How many the same prompt has where nothing is pruned."""
    model, processor = parts
    ids: Any = prompt_inputs(processor, [Prompt("asked", text, images)])["input_ids"]
    return int((ids == model.config.image_token_index).sum())


def test_an_image_that_is_refused_leaves_the_engine_alive(served: Any, parts: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        answers(served, [{"prompt": "<image>", "multi_modal_data": {"image": ["no picture"]}}])
    for key, value in MAY_NOT_BE_SET.items():
        with pytest.raises(InputError, match=f"'{key}'"):
            answers(served, [{**asked(*CASES["two tiles"]), "mm_processor_kwargs": {key: value}}])
    outputs = answers(served, [asked(*CASES["two tiles"])])
    assert tokens(outputs) == [in_transformers(parts, PRUNER, *CASES["two tiles"])]
