"""A client for vLLM's server that takes OpenAI's messages and says what is kept of their images.

client = VLLMClient(openai.OpenAI(base_url="http://localhost:8000/v1", api_key="-"), ranker)
answer = client.chat.completions.create(model="...", messages=messages)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from pore.data.prompts import Prompt, adds_start, render_messages
from pore.errors import InputError, UnsupportedModelError
from pore.families.registry import family_of
from pore.serving.pictures import Sources, opened
from pore.serving.reencoding import Choice, Ranker
from pore.serving.requests import Limits, conversation
from pore.serving.vllm.indices import KEY, MODEL_TYPES, entries
from pore.serving.vllm.requests import engine_prompt, image_part, picture_part

if TYPE_CHECKING:
    import PIL.Image


class VLLMClient:
    """Sends requests to a vLLM server with what a method keeps of their images.

    A server for LLaVA is started with the same checkpoint and `--enable-mm-embeds`, and knows
    nothing of pore; it gets embeddings. One for Qwen2.5-VL or Qwen3-VL runs pore's plug-in with
    `{"by_request": true}` and `--trust-request-mm-kwargs`; it gets the pictures, with the indices
    of the tokens that are kept, which so keep their positions.

    Every request is ranked here, with the whole conversation as the question, so a later turn may
    keep other tokens of the same image, and finds no prefix in the server's cache. Requests may
    come from several threads; they are ranked one after another and answered at the same time.

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

    def create(self, *, messages: Sequence[Mapping[str, Any]], **others: Any) -> Any:
        """What the client's own `chat.completions.create` returns for the pruned request.

        Args:
            messages: The conversation as OpenAI's clients write it.
            **others: Passed on as they are, such as `model`, `max_tokens`, `stream`.

        Raises:
            InputError: An image cannot be read or ranked; nothing is sent then.
        """
        sent = self.pruned(messages)
        extra = {**sent["extra_body"], **(others.pop("extra_body", None) or {})}
        return self._client.chat.completions.create(
            messages=sent["messages"], extra_body=extra, **others
        )

    def pruned(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What is sent of a conversation.

        Args:
            messages: The conversation as OpenAI's clients write it.

        Returns:
            `messages`, with the embeddings that are kept in place of every image or with the
            pictures as they were ranked; and `extra_body`.

        Raises:
            InputError: An image cannot be read or ranked.
        """
        ranked = self._rank(messages)
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
                extra["mm_processor_kwargs"] = {KEY: entries(ranked.choice.images)}
        return {"messages": _replaced(messages, parts), "extra_body": extra}

    def engine_prompt(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The pruned conversation for the engine in this process, `vllm.LLM.generate`.

        Args:
            messages: The conversation as OpenAI's clients write it.

        Raises:
            InputError: An image cannot be read or ranked.
        """
        ranked = self._rank(messages)
        if not self._indices or not ranked.images:
            return engine_prompt(ranked.choice, self.ranker.width)
        return {
            "prompt_token_ids": list(ranked.choice.ids),
            "multi_modal_data": {"image": ranked.images},
            "mm_processor_kwargs": {KEY: entries(ranked.choice.images)},
        }

    def _rank(self, messages: Sequence[Mapping[str, Any]]) -> _Ranked:
        """The conversation in the chat template, its images, and what is kept of them."""
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
        return _Ranked(text, images, choice)


class _Ranked(NamedTuple):
    """A conversation in the chat template, its images, and what is kept of them."""

    text: str
    images: list[PIL.Image.Image]
    choice: Choice


def _replaced(
    messages: Sequence[Mapping[str, Any]], parts: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Messages with other parts in place of their images, in order."""
    rest = iter(parts)
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
