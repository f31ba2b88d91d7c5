"""A client for vLLM's server that takes OpenAI's messages and sends images that are pruned already.

client = VLLMClient(openai.OpenAI(base_url="http://localhost:8000/v1", api_key="-"), ranker)
answer = client.chat.completions.create(model="...", messages=messages)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

from pore.data.prompts import Prompt, adds_start, render_messages
from pore.errors import InputError
from pore.serving.pictures import Sources, opened
from pore.serving.reencoding import Choice, Ranker
from pore.serving.requests import Limits, conversation
from pore.serving.vllm.requests import engine_prompt, image_part


class VLLMClient:
    """Sends pruned requests to a vLLM server that knows nothing of pore.

    The server is started with the same checkpoint and `--enable-mm-embeds`. Every request is ranked
    here, with the whole conversation as the question, so a later turn may keep other tokens of the
    same image, and finds no prefix in the server's cache. Requests may come from several threads;
    they are ranked one after another and answered at the same time.

    Args:
        client: An `openai.OpenAI` or `openai.AsyncOpenAI`, or what works like them; None for
            `pruned` and `engine_prompt` alone.
        ranker: Says what is kept.
        sources: Where images may come from, beside data URLs; the default is nowhere.

    Attributes:
        ranker: The same.
        chat: As in OpenAI's client, `chat.completions.create`.
    """

    def __init__(self, client: Any, ranker: Ranker, sources: Sources | None = None) -> None:
        self._client = client
        self._sources = sources or Sources()
        self.ranker = ranker
        self._lock = Lock()
        self.chat = _Chat(self)

    def create(self, *, messages: Sequence[Mapping[str, Any]], **others: Any) -> Any:
        """What the client's own `chat.completions.create` returns for the pruned request.

        Args:
            messages: The conversation as OpenAI's clients write it.
            **others: Passed on as they are, such as `model`, `max_tokens`, `stream`.

        Raises:
            InputError: An image cannot be read or ranked; nothing is sent then.
        """
        text, choice = self._choose(messages)
        # The server's prompt begins as the ranker's; by itself it never adds the start token.
        start = {"add_special_tokens": adds_start(self.ranker.processor, text)}
        others["extra_body"] = {**start, **(others.get("extra_body") or {})}
        sent = self._replaced(messages, choice)
        return self._client.chat.completions.create(messages=sent, **others)

    def pruned(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages with the embeddings that are kept in place of every image.

        Args:
            messages: The conversation as OpenAI's clients write it.

        Raises:
            InputError: An image cannot be read or ranked.
        """
        return self._replaced(messages, self._choose(messages)[1])

    def engine_prompt(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The pruned conversation for the engine in this process, `vllm.LLM.generate`.

        Args:
            messages: The conversation as OpenAI's clients write it.

        Raises:
            InputError: An image cannot be read or ranked.
        """
        return engine_prompt(self._choose(messages)[1], self.ranker.width)

    def _choose(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, Choice]:
        """The conversation in the chat template, and what is kept of its images."""
        asked, urls = conversation(list(messages))
        text = render_messages(self.ranker.processor, asked)
        limits = Limits()
        images = opened([self._sources.read(url, limits) for url in urls], limits)
        with self._lock:
            (choice,) = self.ranker.choose([Prompt("the request", text, images)])
        if len(choice.images) != len(images):
            raise InputError(
                f"The chat template shows {len(choice.images)} of {len(images)} "
                "images; ask about each in the turn that it comes with."
            )
        return text, choice

    def _replaced(
        self, messages: Sequence[Mapping[str, Any]], choice: Choice
    ) -> list[dict[str, Any]]:
        """Messages with what is kept in place of their images."""
        width = self.ranker.width
        rest = iter([image_part(image.embeddings, width) for image in choice.images])
        sent = []
        for message in messages:
            content = message["content"]
            if not isinstance(content, str):
                content = [next(rest) if part["type"] == "image_url" else part for part in content]
            sent.append({**message, "content": content})
        return sent


class _Chat:
    """`chat.completions`, as in OpenAI's client."""

    def __init__(self, client: VLLMClient) -> None:
        self.completions = client
