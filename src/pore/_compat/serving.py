"""How `transformers serve` answers chat completions: its modules are private to its command.

`transformers.cli.serving` (the extra `transformers[serving]`) runs `generate` on one thread, one
request after the other, reads reasoning out of the answer, and writes it in OpenAI's format, whole
or as server-sent events; a client that goes away stops it. These parts are used. How it reads
requests is not: it opens any file or address that one names, and answers bad ones with 500."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_DONE = "data: [DONE]\n\n"


class ChatAnswers:
    """Answers in OpenAI's format, one at a time, from anything that has `generate` and `config`.

    Raises:
        ImportError: The extra `transformers[serving]` is not installed.
    """

    def __init__(self) -> None:
        from transformers.cli.serving.chat_completion import ChatCompletionHandler
        from transformers.cli.serving.utils import GenerateManager

        # Its first two arguments load models, which is done already.
        self._handler = ChatCompletionHandler(None, None)
        self._manager = GenerateManager()

    async def whole(
        self, ident: str, model: Any, processor: Any, name: str, inputs: Mapping[str, Any]
    ) -> Any:
        """An answer in one piece.

        Args:
            ident: Id of the answer.
            model: What answers; `generate` is called on the thread that all answers share, with the
                inputs, `generation_config` and `tokenizer`.
            processor: Its processor.
            name: What the answer calls the model.
            inputs: What `generate` gets.

        Returns:
            A response of Starlette.

        Raises:
            Exception: Whatever `generate` raises.
        """
        config = model.generation_config
        return await self._handler._non_streaming(
            ident, model, processor, name, inputs, config, gen_manager=self._manager
        )

    def stream(
        self, ident: str, model: Any, processor: Any, name: str, inputs: Mapping[str, Any]
    ) -> Any:
        """An answer as server-sent events, the last of which is OpenAI's `[DONE]`.

        Args:
            ident: As in `whole`, like the others.
            model: What answers; `generate` gets a `streamer` too. What it raises is an event.
            processor: Its processor.
            name: What the answer calls the model.
            inputs: What `generate` gets.

        Returns:
            A response of Starlette. `generate` has been called for already.
        """
        config = model.generation_config
        response = self._handler._streaming(
            ident, model, processor, name, inputs, config, gen_manager=self._manager
        )
        response.body_iterator = _with_end(response.body_iterator)
        return response


async def _with_end(events: Any) -> Any:
    async for event in events:
        yield event
    yield _DONE
