"""A pruned model on Ray Serve: several replicas, each of which answers requests in batches.

    pip install 'pore-vlm[ray]' 'ray[serve]'
    python docs/ray_serve.py

It takes the requests of `pore serve` (docs/serving.md) without `stream`, `seed` and `stop`.
Requests that wait at the same time are answered in one batch, as long as they ask for the same
budget and the same decoding.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

import pore
from pore.data.loading import load_model
from pore.evaluation.harness.asking import Asker, Conversation, Decoding, Reply
from pore.serving.pictures import Sources, opened
from pore.serving.requests import ChatRequest, Limits, RequestError

MODEL, REPLICAS, KEEP = "embedded", 2, 0.25
BATCH, WAIT = 8, 0.05  # requests, and seconds that the first one waits for others


@serve.deployment(num_replicas=REPLICAS, max_ongoing_requests=4 * BATCH)
class Pruned:
    """One replica: a model of its own, which is pruned at the budget of every request."""

    def __init__(self, model: str = MODEL) -> None:
        self.name = model
        self.asker = Asker(*load_model(model))
        self.limits = Limits()

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer one request: read it, and wait for its batch."""
        try:
            asked = ChatRequest.read(await request.body(), self.name, self.limits)
            if asked.stream or asked.stop or asked.seed is not None:
                raise RequestError("stream, stop and seed are not taken here; leave them out.")
            files = [Sources().read(url, self.limits) for url in asked.images]
            pictures = await asyncio.to_thread(opened, files, self.limits)
            about = Conversation("this request", asked.messages, pictures)
            answer = await self.batch((asked, about))
            if isinstance(answer, pore.PoreError):
                raise answer
            reply, together = answer
        except pore.PoreError as error:
            message = {"message": str(error), "type": "invalid_request_error"}
            return JSONResponse({"error": message}, getattr(error, "status", 400))
        choice = {"index": 0, "message": {"role": "assistant", "content": reply.text}}
        tokens = {"visual_tokens_kept": reply.effort.left, "answered_together": together}
        return JSONResponse({"object": "chat.completion", "choices": [choice], "pore": tokens})

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT)
    async def batch(self, waiting: list[tuple[ChatRequest, Conversation]]) -> list[Any]:
        """Answer the requests that wait; one that fails gets its error, others their answers."""
        return await asyncio.to_thread(self._answers, waiting)

    def _answers(self, waiting: list[tuple[ChatRequest, Conversation]]) -> list[Any]:
        alike: dict[str, list[int]] = defaultdict(list)
        for i, (asked, about) in enumerate(waiting):
            how = (asked.keep, asked.new_tokens, asked.temperature, asked.top_p, bool(about.images))
            alike[repr(how)].append(i)  # of repr: 1 and 1.0 are different budgets
        found: list[Any] = [None] * len(waiting)
        for numbers in alike.values():
            group = [waiting[i] for i in numbers]
            try:
                answers: list[Any] = [(reply, len(group)) for reply in self._ask(group)]
            except pore.PoreError:
                answers = [self._alone(one) for one in group]
            for i, answer in zip(numbers, answers, strict=True):
                found[i] = answer
        return found

    def _alone(self, one: tuple[ChatRequest, Conversation]) -> Any:
        try:
            return self._ask([one])[0], 1
        except pore.PoreError as error:
            return error

    def _ask(self, group: list[tuple[ChatRequest, Conversation]]) -> list[Reply]:
        asked = group[0][0]
        self.asker.pruner = pore.FastV(keep=KEEP if asked.keep is None else asked.keep)
        decoding = Decoding(asked.decoding(self.asker.model.generation_config))
        return self.asker.ask([about for _, about in group], decoding)


app = Pruned.bind()

if __name__ == "__main__":
    serve.run(app, route_prefix="/v1/chat/completions", blocking=True)
