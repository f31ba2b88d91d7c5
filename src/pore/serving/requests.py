"""Requests for chat completions, in OpenAI's form: what they ask, within limits, or why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pore._saved.parsing import parse_json
from pore.errors import InputError
from pore.methods.settings import read_budget

# As clients write them, and as chat templates know them.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

_STOPS, _STOP_LENGTH = 4, 128  # texts, and characters of each

# Below it, scores divided by a temperature are infinite; vLLM samples from there on, too.
_COLDEST = 1e-5

# A text of more characters for each position of the model has more tokens than it takes; the
# shortest that are refused for their characters have so many.
_CHARACTERS_A_TOKEN, _CHARACTERS = 16, 1 << 16

_READ = frozenset(
    {"model", "messages", "stream", "max_tokens", "max_completion_tokens"}
    | {"temperature", "top_p", "seed", "stop", "keep"}
)

# They say nothing about the answer.
_NO_MATTER = frozenset(
    {"user", "metadata", "store", "service_tier", "stream_options"}
    | {"safety_identifier", "prompt_cache_key"}
)

# What clients send as defaults; with another value, or one of another type, it would ask for what
# nobody does here.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}


class RequestError(InputError):
    """A request that is refused.

    Attributes:
        status: The HTTP status of the refusal.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at most.

    Attributes:
        body_bytes: Bytes of a request, and of a picture that is fetched for one.
        body_seconds: How long a request may take to come.
        messages: Messages of a request, and parts of them in all.
        characters: Characters of all its texts.
        images: Pictures of a request.
        pixels: Pixels of the pictures of a request, in all.
        new_tokens: Tokens of an answer. A request that names no number gets as many, or what the
            model takes after its prompt if that is less.
        waiting: Requests at a time, those that wait for others included.
    """

    body_bytes: int = 32 << 20
    body_seconds: float = 120.0
    messages: int = 4096
    characters: int = 1 << 21
    images: int = 16
    pixels: int = 64_000_000
    new_tokens: int = 1024
    waiting: int = 256

    def of(self, positions: int | None) -> Limits:
        """These limits for a model, whose prompts cannot have more characters than fit.

        Args:
            positions: How many tokens the model takes; None if it does not say.
        """
        if positions is None:
            return self
        most = max(_CHARACTERS, _CHARACTERS_A_TOKEN * positions)
        return replace(self, characters=min(self.characters, most))

    def read_json(self, data: bytes) -> Any:
        """What a request holds, as JSON.

        Args:
            data: Its body.

        Raises:
            RequestError: It is no JSON, or has more values than any request needs.
        """
        try:
            # Commas and the like within texts count as values, and a part has a few keys.
            return parse_json(data, values=self.characters + 16 * self.messages)
        except ValueError as error:
            raise RequestError(f"The request cannot be read as JSON: {error}") from error

    def check_text(self, characters: int) -> None:
        """Refuse texts that are too long, before they become tokens.

        Args:
            characters: How many the texts of a request have so far.

        Raises:
            RequestError: There are too many.
        """
        if characters > self.characters:
            raise RequestError(
                f"The texts of the request have more than {self.characters} characters in all, "
                "more than the model takes; shorten them."
            )


@dataclass(frozen=True)
class ChatRequest:
    """What a request asks.

    Attributes:
        messages: The conversation as chat templates take it, see `render_messages`.
        images: Where its pictures are, in their order: data, http(s) or file URLs.
        new_tokens: Tokens of the answer, at most; None leaves it to the server.
        keep: Visual tokens to keep of every image (int), or the fraction (float); None leaves it to
            the server.
        temperature: 0 for the likeliest token, more for sampling; None leaves it to the model.
        top_p: Share of the likeliest tokens to sample from; None leaves it to the model.
        seed: Of the sampling.
        stop: Texts after which the answer ends.
        stream: Whether to send the answer piece by piece.
    """

    messages: tuple[dict[str, Any], ...]
    images: tuple[str, ...] = ()
    new_tokens: int | None = None
    keep: int | float | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False

    @classmethod
    def read(cls, data: bytes, name: str, limits: Limits) -> ChatRequest:
        """Read a request.

        Args:
            data: Its body.
            name: Name of the model that is served.
            limits: What it may ask for.

        Returns:
            What it asks.

        Raises:
            RequestError: It is no such request, or asks for something that is not done here; the
                message says what.
        """
        body = limits.read_json(data)
        if not isinstance(body, dict):
            raise RequestError("A request is a JSON object with `model` and `messages`.")
        body = {key: value for key, value in body.items() if value is not None}
        _check_fields(body)
        if body.get("model", name) != name:
            raise RequestError(
                f"There is no model {str(body['model'])[:80]!r} here, only {name!r}.", 404
            )
        messages, images = conversation(body.get("messages"), limits)
        if len(images) > limits.images:
            raise RequestError(
                f"The request has {len(images)} images; at most {limits.images} are taken."
            )
        temperature = _number(body, "temperature", 2.0)
        most = body.get("max_completion_tokens", body.get("max_tokens"))
        return cls(
            messages,
            images,
            new_tokens=None if most is None else _whole("max_tokens", most, 1, limits.new_tokens),
            keep=_budget(body["keep"]) if "keep" in body else None,
            temperature=0.0 if temperature is not None and temperature < _COLDEST else temperature,
            top_p=_number(body, "top_p", 1.0),
            seed=_whole("seed", body["seed"], 0, 2**63 - 1) if "seed" in body else None,
            stop=_stops(body.get("stop", [])),
            stream=_flag("stream", body.get("stream", False)),
        )

    def decoding(self, usual: Any) -> dict[str, Any]:
        """How the answer is decoded.

        Args:
            usual: The generation config of the model.

        Returns:
            Settings of a generation config that differ from the usual.

        Raises:
            RequestError: `top_p` is for sampling, and the answer is not sampled.
        """
        sample = bool(usual.do_sample if self.temperature is None else self.temperature > 0)
        if self.top_p is not None and self.top_p < 1 and not sample:
            raise RequestError("top_p is for sampling; give a temperature above 0 with it.")
        found: dict[str, Any] = {"max_new_tokens": self.new_tokens, "do_sample": sample}
        if not sample:  # transformers warns of what has no effect then
            found |= {"temperature": None, "top_p": None, "top_k": None}
        elif self.temperature is not None:
            found["temperature"] = self.temperature
        if sample and self.top_p is not None:
            found["top_p"] = self.top_p
        return found


def _check_fields(body: Mapping[str, Any]) -> None:
    """Refuse fields that would be ignored although they ask for something."""
    for key, value in body.items():
        if key in _ONLY:
            if not any(value == one and type(value) is type(one) for one in _ONLY[key]):
                raise RequestError(f"{key}={str(value)[:80]!r} is not done here; leave it out.")
        elif key not in _READ | _NO_MATTER:
            raise RequestError(
                f"There is no field {key[:80]!r} in a request; beside OpenAI's there is `keep`, "
                "the visual tokens to keep of every image."
            )


def conversation(
    messages: Any, limits: Limits
) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
    """Read the messages of a request.

    Args:
        messages: The messages as OpenAI's clients write them.
        limits: How many they may be, and how long.

    Returns:
        The messages as chat templates take them, and the URLs of their images, in order.

    Raises:
        RequestError: One has another form, or there is too much; the message says which.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError("`messages` must be a list of at least one message.")
    if len(messages) > limits.messages:
        raise RequestError(
            f"The request has {len(messages)} messages; at most {limits.messages} are taken."
        )
    found = []
    for number, message in enumerate(messages):
        what = f"messages[{number}]"
        if not isinstance(message, dict):
            raise RequestError(f"{what} must be an object with `role` and `content`.")
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise RequestError(
                f"{what}.role is {str(role)[:80]!r}; the roles here are {', '.join(_ROLES)}."
            )
        if message.get("tool_calls"):
            raise RequestError(f"{what} calls tools, which is not done here.")
        found.append({"role": _ROLES[role], "content": message.get("content")})
    return with_parts(found, limits)


def with_parts(
    messages: list[dict[str, Any]], limits: Limits
) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
    """Messages whose content is a list of parts, as chat templates take it.

    Args:
        messages: The messages, with a text or a list of parts each; all else is left as it is.
        limits: How many parts there may be, and how long texts.

    Returns:
        The messages, and the URLs of their images, in order.

    Raises:
        RequestError: A content has another form, or there is too much; the message says which.
    """
    images: list[str] = []
    found = []
    count = characters = 0
    for number, message in enumerate(messages):
        what, content = f"messages[{number}]", message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise RequestError(f"{what}.content must be a text or a list of parts.")
        count += len(content)
        if count > limits.messages:
            raise RequestError(
                f"The messages have more than {limits.messages} parts in all; at most so many are "
                "taken."
            )
        parts = [_part(part, f"{what}.content[{i}]", images) for i, part in enumerate(content)]
        characters += sum(len(part.get("text", "")) for part in parts)
        limits.check_text(characters)
        found.append({**message, "content": parts})
    return tuple(found), tuple(images)


def _part(part: Any, what: str, images: list[str]) -> dict[str, str]:
    """One part of a message; where an image is, is added to the list."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if isinstance(url, str):
            images.append(url)
            return {"type": "image"}
    raise RequestError(
        f'{what} must be {{"type": "text", "text": "..."}} or '
        '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}.'
    )


def _budget(value: Any) -> int | float:
    """`keep`, whose size the method judges."""
    if isinstance(value, str):
        try:
            value = read_budget(value)
        except InputError as error:
            raise RequestError(f"keep: {error}") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(
            "keep is a number of visual tokens (128), or a share of them (0.25 or '25%')."
        )
    return value


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise RequestError(
            f"{name} is a whole number from {least} to {most}, not {str(value)[:80]!r}."
        )
    return value


def _number(body: Mapping[str, Any], name: str, most: float) -> float | None:
    if name not in body:
        return None
    value = body[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise RequestError(f"{name} is a number from 0 to {most:g}, not {str(value)[:80]!r}.")
    return float(value)


def _stops(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if (
        not isinstance(texts, list)
        or len(texts) > _STOPS
        or not all(isinstance(text, str) and 0 < len(text) <= _STOP_LENGTH for text in texts)
    ):
        raise RequestError(
            f"stop is a text, or a list of up to {_STOPS} texts, of 1 to {_STOP_LENGTH} characters "
            "each."
        )
    return tuple(texts)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name} is true or false, not {str(value)[:80]!r}.")
    return value
