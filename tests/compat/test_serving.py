"""How `transformers serve` answers: what of its private parts pore uses, and what they must do."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from helpers.calibrations import make_processor

pytest.importorskip("openai", reason="needs the extra serve: .ci/serve runs this")
pytest.importorskip("fastapi", reason="needs the extra serve: .ci/serve runs this")
pytest.importorskip("uvicorn", reason="needs the extra serve: .ci/serve runs this")

from pore._compat.serving import ChatAnswers

PROMPT = torch.tensor([[1, 7, 8]])
NEW = [9, 10, 11]
PROCESSOR = make_processor()


class Fake:
    """Answers with w9 w10 w11, of at most three tokens."""

    config = SimpleNamespace(model_type="llava")
    generation_config = GenerationConfig(max_new_tokens=3)

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.given: list[dict[str, Any]] = []
        self.threads: set[int] = set()

    def generate(self, streamer: Any = None, **given: Any) -> torch.Tensor:
        self.given.append(given)
        self.threads.add(threading.get_ident())
        if self.error is not None:
            raise self.error
        if streamer is not None:
            streamer.put(PROMPT)
            for token in NEW:
                streamer.put(torch.tensor([token]))
            streamer.end()
        return torch.cat([PROMPT, torch.tensor([NEW])], 1)


def inputs() -> dict[str, Any]:
    return {"input_ids": PROMPT, "logits_processor": []}


async def streamed(answers: ChatAnswers, model: Any) -> list[str]:
    response = answers.stream("one", model, PROCESSOR, "tiny", inputs())
    assert response.media_type == "text/event-stream"
    return "".join([each async for each in response.body_iterator]).strip().split("\n\n")


def test_whole_answers() -> None:
    model, answers = Fake(), ChatAnswers()

    async def ask() -> Any:
        return await asyncio.gather(
            *(answers.whole("one", model, PROCESSOR, "tiny", inputs()) for _ in range(3))
        )

    found = json.loads(asyncio.run(ask())[0].body)
    assert (found["id"], found["model"], found["object"]) == ("one", "tiny", "chat.completion")
    assert found["choices"][0]["message"]["content"].split() == ["w9", "w10", "w11"]
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert model.given[0].keys() == {*inputs(), "generation_config", "tokenizer"}
    assert len(model.threads) == 1
    assert threading.get_ident() not in model.threads


def test_streams() -> None:
    events = asyncio.run(streamed(ChatAnswers(), Fake()))
    assert events.pop() == "data: [DONE]"
    found = [json.loads(event.removeprefix("data: ")) for event in events]
    assert found[0]["choices"][0]["delta"] == {"role": "assistant"}
    text = "".join(each["choices"][0]["delta"].get("content", "") for each in found)
    assert text.split() == ["w9", "w10", "w11"]
    assert found[-1]["choices"][0]["finish_reason"] == "length"
    assert found[-1]["usage"]["completion_tokens"] == 3


def test_errors() -> None:
    answers, model = ChatAnswers(), Fake(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        asyncio.run(answers.whole("one", model, PROCESSOR, "tiny", inputs()))
    events = asyncio.run(streamed(answers, model))
    assert "no" in events[-2]
    found = asyncio.run(answers.whole("one", Fake(), PROCESSOR, "tiny", inputs()))  # still there
    assert found.status_code == 200


def test_a_stream_that_is_left_ends_generate() -> None:
    """The streamer raises in `generate` at the next token."""
    left, ended = threading.Event(), threading.Event()

    class Endless(Fake):
        def generate(self, streamer: Any = None, **_: Any) -> Any:
            streamer.put(PROMPT)
            streamer.put(torch.tensor([9]))
            assert left.wait(60)
            try:
                while True:
                    streamer.put(torch.tensor([9]))
            finally:
                ended.set()

    async def leave() -> None:
        response = ChatAnswers().stream("one", Endless(), PROCESSOR, "tiny", inputs())

        async def read() -> None:
            async for _ in response.body_iterator:
                pass

        reading = asyncio.ensure_future(read())
        await asyncio.sleep(0.1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        left.set()
        assert await asyncio.to_thread(ended.wait, 60)

    asyncio.run(leave())
