"""The client for a stock vLLM server: what it would send."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
import torch

import pore
from cases import CASES
from helpers.chats import picture, user
from helpers.checkpoint import save_checkpoint
from pore.errors import InputError, UnsupportedModelError
from pore.serving.reencoding import Ranker
from pore.serving.vllm.client import VLLMClient
from pore.serving.vllm.indices import checked as checked_entries
from pore.serving.vllm.requests import checked
from processors.base import parts_or_skip
from processors.qwen_vl import KINDS

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


class Answered:
    """Stands for a message that OpenAI's client answers with, an object of pydantic."""

    def model_dump(self, *, exclude_none: bool) -> dict[str, Any]:
        assert exclude_none
        return {"role": "assistant", "content": "w9"}


def test_messages_in_all_forms_that_clients_write(ranker: Ranker) -> None:
    recorder = Recorder()
    client = VLLMClient(recorder, ranker)
    asked = user("w7 w8", picture(1))
    call = {"id": "1", "type": "function", "function": {"name": "w6", "arguments": "{}"}}
    parts = asked["content"]
    for told in (
        (asked,),
        (one for one in [asked]),
        [{"role": "user", "content": tuple(parts)}],
        [{"role": "user", "content": (part for part in parts)}],
    ):
        client.create(messages=told)
    sent = [request["messages"] for request in recorder.sent]
    assert all(one == sent[0] for one in sent)
    assert [part["type"] for part in sent[0][0]["content"]] == ["image_embeds", "text"]
    told = [
        {"role": "developer", "content": "w6", "name": "w7"},
        asked,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "w5"},
        Answered(),
        {"role": "user", "content": "w7"},
    ]
    client.create(messages=told)
    first, _, calls, tool, answer, last = recorder.sent[-1]["messages"]
    assert (first, tool, last) == (told[0], told[3], told[5])
    assert calls == {"role": "assistant", "tool_calls": [call]}
    assert answer == {"role": "assistant", "content": "w9"}
    for wrong in ([], ["w7"], [{"content": "w7"}], [{"role": "user", "content": {"a": 1}}]):
        with pytest.raises(InputError, match="messages"):
            client.create(messages=wrong)


def test_the_messages_of_openai_themselves(ranker: Ranker) -> None:
    types = pytest.importorskip("openai.types.chat", reason="needs openai: .ci/serve runs this")
    recorder = Recorder()
    answer = types.ChatCompletionMessage(role="assistant", content="w9")
    VLLMClient(recorder, ranker).create(messages=[user("w7", picture(1)), answer, user("w8")])
    assert recorder.sent[0]["messages"][1] == {"role": "assistant", "content": "w9"}


def test_a_client_that_is_awaited_ranks_in_a_thread(ranker: Ranker) -> None:
    """The loop goes on while a request waits for the ranker."""
    loops: list[threading.Thread] = []

    class Later(Recorder):
        async def create(self, **request: Any) -> int:  # type: ignore[override]
            loops.append(threading.current_thread())
            return super().create(**request)

    recorder = Later()
    client = VLLMClient(recorder, ranker)

    async def ask() -> int:
        with client._lock:  # as if another one was ranked
            asked = asyncio.ensure_future(client.create(messages=[user("w7", picture(1))]))
            await asyncio.sleep(0.05)
            assert not asked.done()
        found: int = await asked
        return found

    assert asyncio.run(ask()) == 1
    assert loops == [threading.current_thread()]
    assert recorder.sent[0]["messages"][0]["content"][0]["type"] == "image_embeds"
    openai = pytest.importorskip("openai", reason="needs openai: .ci/serve runs this")
    real = VLLMClient(openai.AsyncOpenAI(base_url="http://127.0.0.1:1", api_key="-"), ranker)
    later = real.create(messages=[user("<image>", picture(1))], model="m")
    with pytest.raises(InputError, match="stands for an image"):
        asyncio.run(later)


def kind_of(name: str) -> Any:
    return next(kind for kind in KINDS if kind.name == name)


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "Qwen3-VL"])
def test_where_tokens_have_places_the_picture_goes_with_indices(name: str) -> None:
    processor, model = parts_or_skip(kind_of(name))
    client = VLLMClient(Recorder(), Ranker(model, processor, pore.FastV(keep=KEEP, layer=1)))
    messages = [user("w7 w8", picture(1, 336), picture(2, 672))]
    sent = client.pruned(messages)
    first, second, text = sent["messages"][0]["content"]
    assert text == {"type": "text", "text": "w7 w8"}
    chosen = sent["extra_body"]["mm_processor_kwargs"]["pore_kept"]
    for part, seed, side, entry in ((first, 1, 336, chosen[0]), (second, 2, 672, chosen[1])):
        data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
        pixels = PIL.Image.open(io.BytesIO(data))
        assert pixels.tobytes() == picture(seed, side).tobytes()
        assert len(entry["kept"]) == KEEP
        assert entry["grid"][0] == entry["grid"][1]
    assert json.loads(json.dumps(chosen)) == checked_entries(chosen, 2)
    client.create(messages=messages, extra_body={"mm_processor_kwargs": {"size": 1}, "top_k": 1})
    extra = client._client.sent[0]["extra_body"]
    assert extra["mm_processor_kwargs"] == {"size": 1, "pore_kept": chosen}
    assert extra["top_k"] == 1
    with pytest.raises(InputError, match="leave 'pore_kept' out of extra_body"):
        client.create(
            messages=messages, extra_body={"mm_processor_kwargs": {"pore_kept": [None, None]}}
        )
    prompt = client.engine_prompt(messages)
    assert prompt["mm_processor_kwargs"] == {"pore_kept": chosen}
    assert len(prompt["multi_modal_data"]["image"]) == 2
    assert prompt["prompt_token_ids"].count(model.config.image_token_id) == 2
    alone = client.pruned([{"role": "user", "content": [{"type": "text", "text": "w7"}]}])
    assert "mm_processor_kwargs" not in alone["extra_body"]


def test_a_picture_is_sent_as_a_viewer_shows_it() -> None:
    """vLLM does not turn it, so the indices would be those of another picture."""
    processor, model = parts_or_skip(kind_of("Qwen2.5-VL"))
    client = VLLMClient(None, Ranker(model, processor, pore.FastV(keep=KEEP, layer=1)))
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    with io.BytesIO() as file:
        picture(1).resize((448, 224)).save(file, "PNG", exif=turned)
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    part = {"type": "image_url", "image_url": {"url": url}}
    sent = client.pruned([{"role": "user", "content": [part, {"type": "text", "text": "w7"}]}])
    url = sent["messages"][0]["content"][0]["image_url"]["url"]
    shown = PIL.Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert shown.size == (224, 448)
    (entry,) = sent["extra_body"]["mm_processor_kwargs"]["pore_kept"]
    assert entry["grid"] == [16, 8]


def test_a_model_that_neither_form_fits_is_refused() -> None:
    qwen = next(case for case in CASES if case.name == "Qwen2-VL").model()
    with pytest.raises(UnsupportedModelError, match="plug-in does not know it"):
        VLLMClient(None, Ranker(qwen, None, pore.FastV(keep=KEEP)))


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
