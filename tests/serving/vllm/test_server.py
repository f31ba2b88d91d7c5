"""A stock vLLM server, without the plug-in, behind the client that prunes."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import pore
from helpers.chats import user
from helpers.vllm_engines import LONGEST, Server, generated, save_for_stock
from pore.data.loading import load_model
from pore.data.prompts import build_inputs
from pore.engine.embeddings import kept_embeddings
from pore.serving.reencoding import Ranker, reencoded
from pore.serving.vllm.client import VLLMClient

pytest.importorskip("vllm", reason="vLLM has an environment of its own: .ci/vllm")
openai = pytest.importorskip("openai")

PRUNER = pore.FastV(keep=24, layer=2)
COUNT = 10
GREEDY: dict[str, Any] = {"model": "served", "max_tokens": LONGEST, "temperature": 0}
MORE = {"ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("stock")
    path = save_for_stock(folder / "model")
    options = ["--enable-mm-embeds", "--limit-mm-per-prompt", '{"image": 2}']
    with Server(path, folder / "log.txt", *options) as running:
        yield running


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    return load_model("embedded")


@pytest.fixture(scope="module")
def samples() -> list[Any]:
    return [s for s, _ in zip(pore.load_samples("embedded:test"), range(COUNT), strict=False)]


@pytest.fixture(scope="module")
def expected(parts: Any, samples: Any) -> list[list[int]]:
    """What transformers answers, given the same embeddings."""
    model, processor = parts
    found = []
    for sample in samples:
        inputs = build_inputs(processor, [sample])
        kept = kept_embeddings(model, inputs, PRUNER)
        found += generated(model, **reencoded(model, inputs, kept))
    return found


@pytest.fixture(scope="module")
def client(server: Server) -> VLLMClient:
    theirs = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)
    return VLLMClient(theirs, Ranker.load("embedded", PRUNER))


def messages(sample: Any) -> list[dict[str, Any]]:
    return [user(sample.question, sample.load_image())]


def tokens(answer: Any) -> list[int]:
    return list(answer.choices[0].token_ids)


def test_one_after_another(client: VLLMClient, samples: Any, expected: Any) -> None:
    answers = [
        client.chat.completions.create(messages=messages(s), **GREEDY, extra_body=MORE)
        for s in samples
    ]
    assert [tokens(answer) for answer in answers] == expected
    assert {answer.usage.prompt_tokens for answer in answers} < set(range(32, 48))


def test_many_at_once(client: VLLMClient, server: Server, samples: Any, expected: Any) -> None:
    """A hundred requests from sixteen threads."""

    def ask(number: int) -> list[int]:
        sample = samples[number % COUNT]
        return tokens(
            client.chat.completions.create(messages=messages(sample), **GREEDY, extra_body=MORE)
        )

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(100)))
    assert found == expected * 10
    assert server.alive()


def test_streamed_and_asynchronous(server: Server, client: VLLMClient, samples: Any) -> None:
    asked = {"messages": messages(samples[0]), **GREEDY}
    whole = client.create(**asked).choices[0].message.content
    stream = client.create(**asked, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in stream) == whole

    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-") as theirs:
            return await VLLMClient(theirs, client.ranker).create(**asked)

    assert asyncio.run(ask()).choices[0].message.content == whole


def test_a_client_that_goes_away(server: Server, client: VLLMClient, samples: Any) -> None:
    for _ in range(4):
        stream = client.create(
            messages=messages(samples[0]),
            model="served",
            max_tokens=300,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stream.close()
    assert server.alive()
    assert client.create(messages=messages(samples[1]), **GREEDY).choices


def encoded(tensor: torch.Tensor) -> str:
    with io.BytesIO() as file:
        torch.save(tensor, file)
        return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("embeds", "status"),
    [
        (encoded(torch.zeros(8, 191)), 400),
        (encoded(torch.zeros(2, 3, 8, 192)), 400),
        ("no base64", 400),
        (base64.b64encode(b"no tensor").decode(), 500),  # so vLLM 0.32 answers
    ],
    ids=["width", "shape", "base64", "tensor"],
)
def test_what_is_wrong_gets_an_answer_and_the_server_lives(
    server: Server, client: VLLMClient, samples: Any, expected: Any, embeds: str, status: int
) -> None:
    """Sent past the client, which would not let it leave."""
    theirs = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)
    content = [
        {"type": "image_embeds", "image_embeds": embeds},
        {"type": "text", "text": "What is this?"},
    ]
    with pytest.raises(openai.APIStatusError) as refused:
        theirs.chat.completions.create(messages=[{"role": "user", "content": content}], **GREEDY)
    assert refused.value.status_code == status
    assert server.alive()
    answer = client.create(messages=messages(samples[0]), **GREEDY, extra_body=MORE)
    assert tokens(answer) == expected[0]
