"""Requests are read whole, or refused with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import GenerationConfig

from helpers.serving import body
from pore.serving.requests import ChatRequest, Limits, RequestError

URL = "data:image/png;base64,AAAA"


def read(given: Any, limits: Limits | None = None) -> ChatRequest:
    data = given if isinstance(given, bytes) else json.dumps(given).encode()
    return ChatRequest.read(data, "served", limits or Limits())


def test_what_a_request_asks() -> None:
    told = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}]},
        {"role": "assistant", "content": "w6", "tool_calls": None, "refusal": None},
        {"role": "user", "content": [{"type": "image_url", "image_url": URL}]},
    ]
    asked = read(
        {
            "model": "served",
            "messages": told,
            "max_tokens": 3,
            "max_completion_tokens": 7,
            "temperature": 0.5,
            "top_p": 1,
            "seed": 0,
            "stop": "end",
            "stream": True,
            "keep": "25%",
            "n": 1,
            "tools": None,
            "user": "somebody",
            "frequency_penalty": 0.0,
        }
    )
    roles = [message["role"] for message in asked.messages]
    assert roles == ["system", "user", "assistant", "user"]
    assert asked.messages[0]["content"] == [{"type": "text", "text": "Be brief."}]
    assert asked.messages[3]["content"] == [{"type": "image"}]
    assert asked.images == (URL, URL)
    assert (asked.new_tokens, asked.temperature, asked.top_p, asked.seed) == (7, 0.5, 1.0, 0)
    assert (asked.stop, asked.stream, asked.keep) == (("end",), True, 0.25)
    assert read(body()).keep is None
    assert [type(read(body(keep=keep)).keep) for keep in (1, 1.0)] == [int, float]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (b"{nope", "cannot be read as JSON"),
        (b"\xff", "cannot be read as JSON"),
        (b'{"messages": NaN}', "cannot be read as JSON"),
        (b"[" * 100 + b"]" * 100, "cannot be read as JSON"),
        (b"[]", "JSON object"),
        ({}, "`messages` must be a list"),
        ({"messages": []}, "at least one"),
        ({"messages": ["hello"]}, r"messages\[0\] must be an object"),
        ({"messages": [{"role": "tool", "content": "a"}]}, r"messages\[0\].role is 'tool'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content must be a text or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, r"content\[0\] must be"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "must be"),
        ({"messages": [{"role": "user", "content": ["text"]}]}, "must be"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "calls tools",
        ),
        (body(model="other"), "no model 'other'"),
        (body(max_tokens=0), "max_tokens is a whole number from 1 to 1024"),
        (body(max_tokens=1025), "max_tokens"),
        (body(max_tokens=True), "max_tokens"),
        (body(max_tokens="7"), "max_tokens"),
        (body(temperature="hot"), "temperature is a number from 0 to 2"),
        (body(temperature=-1), "temperature"),
        (body(temperature=True), "temperature"),
        (body(top_p=2), "top_p"),
        (body(seed=-1), "seed"),
        (body(seed=0.5), "seed"),
        (body(temperature=10**400), "temperature is a number from 0 to 2"),
        (body(top_p=10**400), "top_p is a number from 0 to 1"),
        (body(stop=[""]), "stop is a text"),
        (body(stop="a" * 129), "stop is a text, or a list of up to 4 texts, of 1 to 128"),
        (body(stop=["a", "b" * 200_000]), "stop is a text"),
        (body(stop=["a"] * 5), "stop is a text"),
        (body(stream="yes"), "stream is true or false"),
        (body(keep=True), "keep is a number"),
        (body(keep=[1]), "keep is a number"),
        (body(keep="many"), "keep: 'many' is neither"),
        (body(keep="\u0663"), "is neither"),  # a three, in Arabic digits
        (body(keep="1_0"), "keep: '1_0' is neither"),
        (body(keep="nan"), "keep: 'nan' is neither"),
        (body(keep="9" * 5000), "is neither"),
        (body(n=2), "n='2' is not done here"),
        (body(n=True), "n='True' is not done here"),
        (body(n=1.0), "n='1.0' is not done here"),
        (body(frequency_penalty=False), "frequency_penalty='False' is not done here"),
        (body(logprobs=0), "logprobs='0' is not done here"),
        (body(tools=[{"type": "function"}]), "tools="),
        (body(response_format={"type": "json_object"}), "response_format="),
        (body(logprobs=True), "logprobs="),
        (body(generation_config="{}"), "no field 'generation_config'"),
        (body(*[URL] * 17), "17 images; at most 16"),
        ({"messages": [{"role": "user", "content": "q"}] * 4097}, "4097 messages; at most 4096"),
        ({"messages": [{"role": ["user"], "content": "q"}]}, "role is"),
        (body(*["data:"] * 4096), "more than 4096 parts"),
    ],
)
def test_what_is_refused(given: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as found:
        read(given)
    assert found.value.status == (404 if "no model" in reason else 400)


def test_how_answers_are_decoded() -> None:
    greedy, sampled = GenerationConfig(), GenerationConfig(do_sample=True, temperature=0.7)
    plain = read(body())
    assert plain.decoding(greedy)["do_sample"] is False
    assert plain.decoding(sampled) == {"max_new_tokens": 5, "do_sample": True}
    assert read(body(temperature=0)).decoding(sampled)["do_sample"] is False
    warm = read(body(temperature=0.5, top_p=0.9, stop=["a", "b"])).decoding(greedy)
    assert (warm["do_sample"], warm["temperature"], warm["top_p"]) == (True, 0.5, 0.9)
    for cold in (1e-300, 1e-45, 0.0, -0.0):
        assert read(body(temperature=cold)).decoding(sampled)["do_sample"] is False
    assert "top_k" not in warm
    assert read(body(top_p=1)).decoding(greedy)["do_sample"] is False
    with pytest.raises(RequestError, match="top_p is for sampling"):
        read(body(top_p=0.9)).decoding(greedy)


def test_texts_are_no_longer_than_the_model_could_take() -> None:
    """They are counted in all messages, before anything is made tokens."""
    limits = Limits().of(1024)
    most = limits.characters
    assert most == 1 << 16
    assert Limits().of(100_000).characters == 1_600_000
    assert Limits().of(None) == Limits()
    assert Limits(characters=10).of(100_000).characters == 10
    told = [{"role": "user", "content": "a" * (most // 2)}, {"role": "user", "content": []}]
    for more, taken in (("b" * (most // 2), True), ("b" * (most // 2 + 1), False)):
        told[1]["content"] = [{"type": "text", "text": more}]
        if taken:
            assert len(read({"messages": told}, limits).messages) == 2
            continue
        with pytest.raises(RequestError, match="more than 65536 characters in all"):
            read({"messages": told}, limits)
    with pytest.raises(RequestError, match="more than 131072 values"):
        read({"messages": [{}] * 200_000}, limits)
