"""The client for a stock vLLM server: what it would send."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pore
from helpers.chats import picture, user
from helpers.checkpoint import save_checkpoint
from pore.errors import InputError
from pore.serving.reencoding import Ranker
from pore.serving.vllm.client import VLLMClient
from pore.serving.vllm.requests import checked

KEEP = 5


class Recorder:
    """Stands for OpenAI's client."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.chat = SimpleNamespace(completions=self)

    def create(self, **request: Any) -> int:
        self.sent.append(request)
        return len(self.sent)


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    folder: Path = save_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    return Ranker.load(str(folder), pore.FastV(keep=KEEP, layer=2))


def sent_embeddings(part: dict[str, Any]) -> torch.Tensor:
    assert part["type"] == "image_embeds"
    found: torch.Tensor = torch.load(
        io.BytesIO(base64.b64decode(part["image_embeds"])), weights_only=True
    )
    return found


def test_images_are_replaced_and_the_rest_is_passed_on(ranker: Ranker) -> None:
    recorder = Recorder()
    client = VLLMClient(recorder, ranker)
    messages = [
        {"role": "system", "content": "w6"},
        user("w7 w8", picture(1), picture(2)),
    ]
    assert client.chat.completions.create(model="m", messages=messages, max_tokens=3) == 1
    (request,) = recorder.sent
    assert request["model"] == "m"
    assert request["max_tokens"] == 3
    assert request["extra_body"] == {"add_special_tokens": True}
    system, asked = request["messages"]
    assert system == messages[0]
    assert asked["content"][2] == {"type": "text", "text": "w7 w8"}
    prompt = client.engine_prompt(messages)
    rows = prompt["multi_modal_data"]["image"]
    assert len(rows) == 2
    for part, expected in zip(asked["content"][:2], rows, strict=True):
        assert torch.equal(sent_embeddings(part), expected)
        assert expected.shape == (KEEP, ranker.width)
    assert not torch.equal(*rows)
    assert messages[1]["content"][0]["type"] == "image_url"  # the caller's are left alone


def test_another_question_keeps_other_tokens(ranker: Ranker) -> None:
    client = VLLMClient(None, ranker)
    one, other = (client.engine_prompt([user(text, picture(1))]) for text in ("w7 w8", "w30 w31"))
    assert not torch.equal(
        one["multi_modal_data"]["image"][0], other["multi_modal_data"]["image"][0]
    )


def test_text_alone_is_passed_on(ranker: Ranker) -> None:
    recorder, messages = Recorder(), [{"role": "user", "content": "w7"}]
    VLLMClient(recorder, ranker).create(messages=messages, extra_body={"top_k": 1})
    assert recorder.sent[0]["messages"] == messages
    assert recorder.sent[0]["extra_body"] == {"add_special_tokens": True, "top_k": 1}
    assert "multi_modal_data" not in VLLMClient(None, ranker).engine_prompt(messages)


def test_nothing_is_sent_of_what_is_wrong(ranker: Ranker) -> None:
    recorder = Recorder()
    client = VLLMClient(recorder, ranker)
    for wrong in (
        [user("<image>", picture(1))],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "data:,"}]}],
    ):
        with pytest.raises(InputError):
            client.create(messages=wrong)
    assert recorder.sent == []


@pytest.mark.parametrize(
    ("embeddings", "reason"),
    [
        (torch.zeros(4, 31), r"\(tokens, 32\) for this model"),
        (torch.zeros(0, 32), "at least one token"),
        (torch.zeros(2, 4, 32), r"not \(2, 4, 32\)"),
        (torch.full((4, 32), torch.nan), "NaN or infinity"),
        (torch.zeros(4, 32, dtype=torch.long), "are not floating-point"),
    ],
)
def test_embeddings_that_could_end_the_engine_do_not_leave(
    embeddings: torch.Tensor, reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        checked(embeddings, 32)
