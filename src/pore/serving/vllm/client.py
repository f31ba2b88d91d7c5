"""A client for vLLM's server that takes OpenAI's messages and says what is kept of their images.

client = VLLMClient(openai.OpenAI(base_url="http://localhost:8000/v1", api_key="-"), ranker)
answer = client.chat.completions.create(model="...", messages=messages)
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterable, Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from pore.data.prompts import Prompt, adds_start, render_messages
from pore.errors import InputError, PoreError, UnsupportedModelError
from pore.families.registry import family_of
from pore.serving.pictures import Sources, opened
from pore.serving.reencoding import Choice, Ranker
from pore.serving.requests import Limits, with_parts
from pore.serving.vllm.indices import KEY, MODEL_TYPES, entries
from pore.serving.vllm.requests import engine_prompt, image_part, picture_part

if TYPE_CHECKING:
    import PIL.Image

_PROCESSOR = "mm_processor_kwargs"


class VLLMClient:
    """Sends requests to a vLLM server with what a method keeps of their images.

    A server for LLaVA is started with the same checkpoint and `--enable-mm-embeds`, and knows
    nothing of pore; it gets embeddings. One for Qwen2.5-VL or Qwen3-VL runs pore's plug-in with
    `{"by_request": true}` and `--trust-request-mm-kwargs`; it gets the pictures, with the indices
    of the tokens that are kept, which so keep their positions.

    Every request is ranked here, with the whole conversation as the question, so a later turn may
    keep other tokens of the same image, and finds no prefix in the server's cache. Requests may
    come from several threads; they are ranked one after another and answered at the same time. With
    an `AsyncOpenAI` they are ranked in a thread, and its event loop goes on.

    Messages are OpenAI's own: dicts, or the objects that its client answers with. Their texts and
    images are read; roles and calls of tools are passed on for the server to judge.

    Args:
        client: An `openai.OpenAI` or `openai.AsyncOpenAI`, or what works like them; None for
            `pruned` and `engine_prompt` alone.
        ranker: Says what is kept.
        sources: Where images may come from, beside data URLs; the default is nowhere.

    Attributes:
        ranker: The same.
        chat: As in OpenAI's client, `chat.completions.create`.

    Raises:
        UnsupportedModelError: Neither embeddings nor indices tell what is kept in such a model.
    """

    def __init__(self, client: Any, ranker: Ranker, sources: Sources | None = None) -> None:
        family = family_of(ranker.model)
        self._indices = ranker.model.config.model_type in MODEL_TYPES
        if (family.mrope or family.deepstack) and not self._indices:
            raise UnsupportedModelError(
                f"{family.name} places every visual token on three axes, or adds features to it in "
                "later layers, which embeddings do not tell, and vLLM's plug-in does not know it; "
                "use Qwen2.5-VL, Qwen3-VL or a LLaVA."
            )
        self._client = client
        self._sources = sources or Sources()
        self.ranker = ranker
        self._lock = Lock()
        self.chat = _Chat(self)

    def create(self, *, messages: Iterable[Any], **others: Any) -> Any:
        """What the client's own `chat.completions.create` returns for the pruned request.

        Args:
            messages: The conversation as OpenAI's clients write it.
            **others: Passed on as they are, such as `model`, `max_tokens`, `stream`.

        Raises:
            InputError: An image cannot be read or ranked; nothing is sent then.
        """
        create = self._client.chat.completions.create
        told = list(messages)
        if not inspect.iscoroutinefunction(inspect.unwrap(create)):
            return create(**self._request(told, others))

        async def later() -> Any:
            return await create(**await asyncio.to_thread(self._request, told, others))

        return later()

    def _request(self, messages: list[Any], others: Mapping[str, Any]) -> dict[str, Any]:
        """All that is sent."""
        sent = self.pruned(messages)
        theirs = others.get("extra_body") or {}
        extra = {**sent["extra_body"], **theirs}
        if _PROCESSOR in sent["extra_body"]:
            settings = theirs.get(_PROCESSOR) or {}
            if KEY in settings:
                raise InputError(f"The ranker says what is kept; leave {KEY!r} out of extra_body.")
            extra[_PROCESSOR] = {**settings, **sent["extra_body"][_PROCESSOR]}
        return {**others, "messages": sent["messages"], "extra_body": extra}

    def pruned(self, messages: Iterable[Any]) -> dict[str, Any]:
        """What is sent of a conversation.

        Args:
            messages: The conversation as OpenAI's clients write it.

        Returns:
            `messages`, with the embeddings that are kept in place of every image or with the
            pictures as they were ranked; and `extra_body`.

        Raises:
            InputError: An image cannot be read or ranked.
        """
        told = _plain(messages)
        ranked = self._rank(told)
        # The server's prompt begins as the ranker's; by itself it never adds the start token.
        extra: dict[str, Any] = {
            "add_special_tokens": adds_start(self.ranker.processor, ranked.text)
        }
        if not self._indices:
            width = self.ranker.width
            parts = [image_part(image.embeddings, width) for image in ranked.choice.images]
        else:
            parts = [picture_part(image) for image in ranked.images]
            if parts:
                extra[_PROCESSOR] = {KEY: entries(ranked.choice.images)}
        return {"messages": _replaced(told, parts), "extra_body": extra}

    def engine_prompt(self, messages: Iterable[Any]) -> dict[str, Any]:
        """The pruned conversation for the engine in this process, `vllm.LLM.generate`.

        Args:
            messages: The conversation as OpenAI's clients write it.

        Raises:
            InputError: An image cannot be read or ranked.
        """
        ranked = self._rank(_plain(messages))
        if not self._indices or not ranked.images:
            return engine_prompt(ranked.choice, self.ranker.width)
        return {
            "prompt_token_ids": list(ranked.choice.ids),
            "multi_modal_data": {"image": ranked.images},
            _PROCESSOR: {KEY: entries(ranked.choice.images)},
        }

    def _rank(self, messages: list[dict[str, Any]]) -> _Ranked:
        """The conversation in the chat template, its images, and what is kept of them."""
        limits = Limits()
        # A message that calls tools may have no content.
        told = [one if "content" in one else {**one, "content": []} for one in messages]
        asked, urls = with_parts(told, limits)
        try:
            text = render_messages(self.ranker.processor, asked)
        except PoreError:
            raise
        except Exception as error:  # templates raise errors of their own
            raise InputError(f"The chat template refuses the messages: {error}") from error
        images = opened([self._sources.read(url, limits) for url in urls], limits)
        with self._lock:
            (choice,) = self.ranker.choose([Prompt("the request", text, images)])
        if len(choice.images) != len(images):
            raise InputError(
                f"The chat template shows {len(choice.images)} of {len(images)} "
                "images; ask about each in the turn that it comes with."
            )
        return _Ranked(text, images, choice)


class _Ranked(NamedTuple):
    """A conversation in the chat template, its images, and what is kept of them."""

    text: str
    images: list[PIL.Image.Image]
    choice: Choice


def _plain(messages: Iterable[Any]) -> list[dict[str, Any]]:
    """Messages as dicts whose contents are texts and lists.

    An answer of OpenAI's client is an object of pydantic, which goes into the next request.
    """
    found = []
    for number, message in enumerate(messages):
        if hasattr(message, "model_dump"):
            message = message.model_dump(exclude_none=True)
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"messages[{number}] must be an object with `role` and `content`.")
        plain = {name: value for name, value in message.items() if value is not None}
        if isinstance(plain.get("content"), Iterable) and not isinstance(plain["content"], str):
            plain["content"] = list(plain["content"])
        found.append(plain)
    if not found:
        raise InputError("`messages` must hold at least one message.")
    return found


def _replaced(
    messages: list[dict[str, Any]], parts: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Messages with other parts in place of their images, in order."""
    rest = iter(parts)
    sent = []
    for message in messages:
        if isinstance(content := message.get("content"), list):
            content = [next(rest) if part["type"] == "image_url" else part for part in content]
            message = {**message, "content": content}
        sent.append(message)
    return sent


class _Chat:
    """`chat.completions`, as in OpenAI's client."""

    def __init__(self, client: VLLMClient) -> None:
        self.completions = client
