"""The web application: chat completions in OpenAI's format, and what operators ask.

POST /v1/chat/completions   GET /v1/models   GET /health   GET /metrics
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pore._compat.serving import ChatAnswers
from pore.serving.counted import UNAVAILABLE, CountedApp, answered, begun, body, unless_gone
from pore.serving.pictures import Sources, opened
from pore.serving.requests import ChatRequest
from pore.serving.served import Generation, Served

_CHAT = "/v1/chat/completions"

_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


class App(CountedApp):
    """The application, as ASGI servers call it.

    Args:
        served: The model.
        sources: Where pictures of requests may come from.
    """

    def __init__(self, served: Served, sources: Sources | None = None) -> None:
        routes = [
            Route(_CHAT, self._chat, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
        ]
        super().__init__(served, _CHAT, routes)
        self._sources = sources or Sources()
        self._answers = ChatAnswers()
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="pore-preparing")

    # -- chat completions -------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        return await answered(self._answer(request))

    async def _answer(self, request: Request) -> Response:
        served = self.served
        generation = await self._prepared(request)
        begun(request, generation)
        given = (f"chatcmpl-{uuid.uuid4().hex}", generation, served.processor, served.name)
        if generation.asked.stream:
            response = self._answers.stream(*given, generation.inputs)
            # What goes wrong in the prefill still gets a status of its own.
            await unless_gone(request, asyncio.wrap_future(generation.began))
            if generation.error is not None:
                raise generation.error
            response.body_iterator = _to_the_end(response.body_iterator, generation)
        else:
            response = await unless_gone(request, self._answers.whole(*given, generation.inputs))
        if generation.effort is not None:
            response.headers["x-pore-visual-tokens-seen"] = str(generation.effort.seen)
            response.headers["x-pore-visual-tokens-kept"] = str(generation.effort.left)
        return response

    async def _prepared(self, request: Request) -> Generation:
        """What is to be generated, unless the client goes away before that is known."""
        preparing = asyncio.ensure_future(self._read(body(request)))
        begun(request, preparing)
        generation: Generation = await unless_gone(request, preparing)
        return generation

    async def _read(self, data: bytes) -> Generation:
        """What is to be generated; what was sent for it is kept no longer."""
        served, limits = self.served, self.served.limits
        # Not on the thread of all requests, nor on that which prepares, as long ones take a while.
        asked = await asyncio.to_thread(ChatRequest.read, data, served.name, limits)
        files = await asyncio.gather(
            *(asyncio.to_thread(self._sources.read, url, limits) for url in asked.images)
        )

        def prepare() -> Generation:  # one at a time, as pictures may be large
            return served.prepare(replace(asked, images=()), opened(files, limits))

        # What waits for its turn when its client goes away never begins.
        return await asyncio.get_running_loop().run_in_executor(self._preparing, prepare)

    # -- what operators ask -----------------------------------------------------------------------

    async def _models(self, _: Request) -> Response:
        model = {"id": self.served.name, "object": "model", "created": 0, "owned_by": "pore"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _health(self, _: Request) -> Response:
        if self.stopping:
            return JSONResponse({"status": "stopping"}, status_code=UNAVAILABLE)
        return JSONResponse({"status": "ok"})

    async def _metrics(self, _: Request) -> Response:
        return PlainTextResponse(self.served.metrics.text(), media_type=_PROMETHEUS)


async def _to_the_end(events: AsyncIterator[str], generation: Generation) -> AsyncIterator[str]:
    """The events of a stream, which ends when the model is as it was before."""
    async for event in events:
        yield event
    await asyncio.wrap_future(generation.ended)
