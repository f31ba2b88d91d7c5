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
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import pore
from pore.data.loading import load_model
from pore.evaluation.harness.asking import Asker, Conversation, Decoding, Reply
from pore.serving.counted import answered, received
from pore.serving.pictures import Sources, opened
from pore.serving.requests import ChatRequest, RequestError
from pore.serving.served import Served

MODEL, REPLICAS, KEEP = "embedded", 2, 0.25
BATCH, WAIT = 8, 0.05  # requests, and seconds that the first one waits for others


@serve.deployment(num_replicas=REPLICAS, max_ongoing_requests=4 * BATCH)
class Pruned:
    """One replica: a model of its own, which is pruned at the budget of every request."""

    def __init__(self, model: str = MODEL) -> None:
        loaded = load_model(model)
        self.asker = Asker(*loaded)
        # What `pore serve` refuses is refused here, by the same code.
        self.served = Served(model, *loaded, lambda keep: pore.FastV(keep=keep), KEEP)
        self.served.try_out()
        self.preparing = ThreadPoolExecutor(1)

    async def __call__(self, request: Request) -> Response:
        """Answer one request, or say why not."""
        return await answered(self._answer(request))

    async def _answer(self, request: Request) -> Response:
        """Read a request, and wait for its batch."""
        limits = self.served.limits
        data = await received(request.receive, limits.body_bytes, limits.body_seconds)
        prepare = (self.preparing, self._prepared, data)
        one = await asyncio.get_running_loop().run_in_executor(*prepare)
        answer = await self.batch(one)
        if isinstance(answer, Exception):
            raise answer
        reply, together = answer
        choice = {"index": 0, "message": {"role": "assistant", "content": reply.text}}
        tokens = {"visual_tokens_kept": reply.effort.left, "answered_together": together}
        return JSONResponse({"object": "chat.completion", "choices": [choice], "pore": tokens})

    def _prepared(self, data: bytes) -> tuple[ChatRequest, Conversation]:
        """What a request asks, or why it is refused; one at a time, as pictures may be large."""
        served, limits = self.served, self.served.limits
        asked = ChatRequest.read(data, served.name, limits)
        if asked.stream or asked.stop or asked.seed is not None:
            raise RequestError("stream, stop and seed are not taken here; leave them out.")
        pictures = opened([Sources().read(url, limits) for url in asked.images], limits)
        asked = served.prepare(asked, pictures).asked  # with the length of its answer
        return asked, Conversation("this request", asked.messages, pictures)

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
            except Exception:  # whatever one does must not harm the others
                answers = [self._alone(one) for one in group]
            for i, answer in zip(numbers, answers, strict=True):
                found[i] = answer
        return found

    def _alone(self, one: tuple[ChatRequest, Conversation]) -> Any:
        try:
            return self._ask([one])[0], 1
        except Exception as error:
            return error

    def _ask(self, group: list[tuple[ChatRequest, Conversation]]) -> list[Reply]:
        asked = group[0][0]
        self.asker.pruner = self.served.pruner(asked.keep)
        decoding = Decoding(asked.decoding(self.asker.model.generation_config))
        return self.asker.ask([about for _, about in group], decoding)


app = Pruned.bind()

if __name__ == "__main__":
    serve.run(app, route_prefix="/v1/chat/completions", blocking=True)
