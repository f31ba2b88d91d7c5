"""vLLM's engine with the plug-in on a tiny Qwen-VL: images of any size, three axes.

A process has one engine, so `.ci/vllm` runs this file once for each kind, by `-k`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import PIL.Image
import pytest
import torch

import pore
from helpers.chats import picture
from helpers.vllm_engines import CHUNK, LONGEST, MAY_NOT_BE_SET, answers, engine, generated, tokens
from helpers.vllm_qwen import save_qwen, token_side
from pore.data.loading import load_model
from pore.data.prompts import Prompt, prompt_inputs
from pore.engine.embeddings import kept_embeddings
from pore.errors import InputError, UnsupportedModelError

pytest.importorskip("vllm", reason="vLLM has an environment of its own: .ci/vllm")

KEEP = 0.5
PRUNER = pore.FasterVLM(keep=KEEP)
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


Cases = dict[str, tuple[Any, ...]]
Sized = Callable[[int, int, int], PIL.Image.Image]


@pytest.fixture(scope="module", params=["Qwen2_5_VL", "Qwen3VL"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(kind: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_qwen(tmp_path_factory.mktemp("qwen"), kind))


@pytest.fixture(scope="module")
def parts(checkpoint: str) -> tuple[Any, Any]:
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def served(checkpoint: str, kind: str) -> Any:
    return started(checkpoint, kind, "FasterVLM")


def started(checkpoint: str, kind: str, method: str) -> Any:
    """The engine, or why it does not start."""
    settings = {"method": method, "keep": KEEP}
    architecture = f"Pore{kind}ForConditionalGeneration"
    return engine(checkpoint, hf_overrides={"architectures": [architecture], "pore": settings})


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("FastV", "looks into decoder layers"),
        ("CDPruner", "does not choose by the image alone"),
        ("PruMerge", "stand for no place in the image|which merged tokens have none of"),
    ],
)
def test_what_cannot_be_done_is_refused_at_the_start(
    checkpoint: str, kind: str, method: str, reason: str
) -> None:
    """Before the engine of the other tests starts, as a process has one.

    What settings tell is refused before the engine's processes start, as a RuntimeError.
    """
    kinds = RuntimeError if method == "FastV" else (RuntimeError, UnsupportedModelError)
    with pytest.raises(kinds, match=reason):
        started(checkpoint, kind, method)


def words(seed: int, count: int) -> str:
    return "".join(f" w{(17 * seed + 7 * i) % 100}" for i in range(count))


@pytest.fixture(scope="module")
def sized(kind: str) -> Sized:
    """Makes pictures of so many visual tokens, by seed, rows and columns."""
    side = token_side(kind)
    return lambda seed, rows, columns: picture(seed).resize((side * columns, side * rows))


@pytest.fixture(scope="module")
def cases(sized: Sized) -> Cases:
    return {
        "one": (words(1, 5) + IMAGE + words(2, 6), sized(1, 4, 6)),
        "cut in its middle": (words(3, 9) + IMAGE + words(4, 6), sized(2, 5, 3)),
        "cut, wide": (words(5, 10) + IMAGE + words(6, 9), sized(3, 2, 8)),
        "two": (
            words(7, 3) + IMAGE + words(8, 2) + IMAGE + words(9, 4),
            sized(4, 6, 4),
            sized(5, 3, 3),
        ),
        "two side by side": (
            words(1, 2) + IMAGE + IMAGE + words(2, 4),
            sized(6, 2, 6),
            sized(7, 5, 4),
        ),
        "at the start": (IMAGE + words(3, 5), sized(8, 4, 4)),
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


def test_answers_are_those_of_transformers(served: Any, parts: Any, cases: Cases) -> None:
    """One batch of all kinds; with dense positions, or unpruned, answers would be others."""
    outputs = answers(served, [asked(*case) for case in cases.values()])
    expected = [in_transformers(parts, PRUNER, *case) for case in cases.values()]
    assert dict(zip(cases, tokens(outputs), strict=True)) == dict(zip(cases, expected, strict=True))
    whole = [in_transformers(parts, None, *case) for case in cases.values()]
    assert sum(a != b for a, b in zip(whole, expected, strict=True)) == len(cases) - 1
    token = parts[0].config.image_token_id
    left = {
        name: output.prompt_token_ids.count(token)
        for name, output in zip(cases, outputs, strict=True)
    }
    assert left == {
        "one": 12,
        "cut in its middle": 8,
        "cut, wide": 8,
        "two": 12 + 4,
        "two side by side": 6 + 10,
        "at the start": 8,
        "text": 0,
    }
    for name, output in zip(cases, outputs, strict=True):
        if name.startswith("cut"):
            assert output.prompt_token_ids[CHUNK - 1 : CHUNK + 1] == [token, token]


def test_positions_matter_to_the_answers(parts: Any, cases: Cases) -> None:
    """What the engine would answer if it counted positions without gaps."""
    model, processor = parts
    differing = 0
    for text, *images in cases.values():
        if not images:
            continue
        inputs = prompt_inputs(processor, [Prompt("asked", text, images)])
        kept = kept_embeddings(model, inputs, PRUNER)
        ids = inputs["input_ids"][0]
        visual = ids == model.config.image_token_id
        stays = torch.ones_like(visual)
        stays[visual] = torch.cat(
            [torch.isin(torch.arange(one.seen), torch.tensor(one.kept)) for one in kept]
        )
        embeds = model.get_input_embeddings()(ids).detach()
        embeds[visual & stays] = torch.cat([one.embeddings for one in kept])
        dense = generated(
            model, inputs_embeds=embeds[stays][None], attention_mask=stays[stays][None].long()
        )[0]
        differing += dense != in_transformers(parts, PRUNER, text, *images)
    assert differing >= 4


def test_a_prompt_that_was_there_before_is_cached(served: Any, parts: Any, sized: Sized) -> None:
    case = (words(5, 8) + IMAGE + words(6, 40), sized(9, 4, 5))
    first, again = (answers(served, [asked(*case)])[0] for _ in range(2))
    assert first.num_cached_tokens == 0
    assert again.num_cached_tokens >= 32
    assert tokens([first]) == tokens([again]) == [in_transformers(parts, PRUNER, *case)]


def test_answers_under_pressure(served: Any, parts: Any, sized: Sized) -> None:
    """More requests than run at once, each twice."""
    many = [
        (words(i, i % 9) + IMAGE + words(i + 1, 3 + i % 5), sized(20 + i, 2 + i % 4, 3 + i % 5))
        for i in range(20)
    ]
    outputs = tokens(answers(served, [asked(*case) for case in many * 2]))
    expected = [in_transformers(parts, PRUNER, *case) for case in many]
    assert outputs == expected * 2
    assert all(len(one) == LONGEST for one in outputs)


def test_a_request_that_is_refused_leaves_the_engine_alive(
    served: Any, parts: Any, cases: Cases
) -> None:
    video = torch.zeros(4, 56, 56, 3, dtype=torch.uint8).numpy()
    wrong: list[dict[str, Any]] = [
        {
            "prompt": "<|vision_start|><|video_pad|><|vision_end|>",
            "multi_modal_data": {"video": video},
        },
        {"prompt": IMAGE, "multi_modal_data": {"image": ["no picture"]}},
    ]
    for prompt in wrong:
        with pytest.raises((ValueError, TypeError)):
            answers(served, [prompt])
    for key, value in MAY_NOT_BE_SET.items():
        with pytest.raises(InputError, match=f"'{key}'"):
            answers(served, [{**asked(*cases["one"]), "mm_processor_kwargs": {key: value}}])
    outputs = answers(served, [asked(*cases["one"])])
    assert tokens(outputs) == [in_transformers(parts, PRUNER, *cases["one"])]
