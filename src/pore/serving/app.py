"""The web application: chat completions in OpenAI's format, and what operators ask.

POST /v1/chat/completions   GET /v1/models   GET /health   GET /metrics
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pore._compat.serving import ChatAnswers
from pore.errors import ModelStateError, PoreError
from pore.serving.pictures import Sources
from pore.serving.requests import ChatRequest, RequestError
from pore.serving.served import Generation, Gone, Served

_log = logging.getLogger(__name__)

_CHAT = "/v1/chat/completions"

_BAD, _GONE, _FAILED, _UNAVAILABLE = 400, 499, 500, 503

_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"

# The scope's key for the generation of a request.
_GENERATION = "pore.generation"


class App:
    """The application, as ASGI servers call it.

    Args:
        served: The model.
        sources: Where pictures of requests may come from.

    Attributes:
        stopping: Whether new requests are refused, because the server is to stop.
    """

    def __init__(self, served: Served, sources: Sources | None = None) -> None:
        self._served = served
        self._sources = sources or Sources()
        self._answers = ChatAnswers()
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="pore-preparing")
        self._app = Starlette(
            routes=[
                Route(_CHAT, self._chat, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
            ],
            exception_handlers={HTTPException: _no_route},
        )
        self.stopping = False

    @property
    def idle(self) -> bool:
        """Whether no request is being answered or waits."""
        return self._served.metrics.in_flight == 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, and count it if it is for a chat completion."""
        if scope["type"] != "http" or scope["path"] != _CHAT:
            await self._app(scope, receive, send)
            return
        metrics = self._served.metrics
        reason = self._unavailable()
        if reason is not None:
            metrics.turn_away(_UNAVAILABLE)
            again = {"retry-after": "1", "connection": "close"}
            await _refusal(_UNAVAILABLE, reason, again)(scope, receive, send)
            return
        status = _GONE

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        metrics.begin()
        try:
            await self._app(scope, receive, noted)
        finally:
            metrics.end(status)
            generation = scope.get(_GENERATION)
            if generation is not None:
                generation.cancel()

    def _unavailable(self) -> str | None:
        """Why no request is taken now; None if one is."""
        if self.stopping:
            return "The server is stopping; ask another one."
        if self._served.metrics.in_flight >= self._served.limits.waiting:
            return f"{self._served.limits.waiting} requests wait already; try again later."
        return None

    # -- chat completions -------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        try:
            return await self._answer(request)
        except (Gone, ClientDisconnect):
            return Response(status_code=_GONE)
        except RequestError as error:
            return _refusal(error.status, str(error))
        except ModelStateError as error:
            _log.exception("The model is in a state in which it cannot be pruned.")
            return _refusal(_FAILED, str(error))
        except PoreError as error:
            return _refusal(_BAD, str(error))
        except Exception as error:
            _log.exception("A request failed.")
            return _refusal(_FAILED, f"The server failed: {type(error).__name__}.")

    async def _answer(self, request: Request) -> Response:
        served = self._served
        data = await _body(request, served.limits.body_bytes)
        asked = ChatRequest.read(data, served.name, served.limits)
        images = await asyncio.gather(
            *(asyncio.to_thread(self._sources.open, url, served.limits) for url in asked.images)
        )
        loop = asyncio.get_running_loop()
        generation = await loop.run_in_executor(self._preparing, served.prepare, asked, images)
        request.scope[_GENERATION] = generation
        given = (f"chatcmpl-{uuid.uuid4().hex}", generation, served.processor, served.name)
        if asked.stream:
            response = self._answers.stream(*given, generation.inputs)
            # What goes wrong in the prefill still gets a status of its own.
            await _unless_gone(request, asyncio.wrap_future(generation.began))
            if generation.error is not None:
                raise generation.error
            response.body_iterator = _to_the_end(response.body_iterator, generation)
        else:
            response = await _unless_gone(request, self._answers.whole(*given, generation.inputs))
        if generation.effort is not None:
            response.headers["x-pore-visual-tokens-seen"] = str(generation.effort.seen)
            response.headers["x-pore-visual-tokens-kept"] = str(generation.effort.left)
        return response

    # -- what operators ask -----------------------------------------------------------------------

    async def _models(self, _: Request) -> Response:
        model = {"id": self._served.name, "object": "model", "created": 0, "owned_by": "pore"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _health(self, _: Request) -> Response:
        if self.stopping:
            return JSONResponse({"status": "stopping"}, status_code=_UNAVAILABLE)
        return JSONResponse({"status": "ok"})

    async def _metrics(self, _: Request) -> Response:
        return PlainTextResponse(self._served.metrics.text(), media_type=_PROMETHEUS)


async def _body(request: Request, most: int) -> bytes:
    """The body of a request; RequestError if it is larger than that."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise RequestError(f"The request has more than {most} bytes; send smaller images.", 413)
    return bytes(data)


async def _unless_gone(request: Request, answer: Awaitable[Any]) -> Any:
    """An answer; Gone if the client goes away before it is there."""
    work = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(request.receive())
    await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
        work.add_done_callback(_forget)
        raise Gone
    leaving.cancel()
    return work.result()


async def _to_the_end(events: AsyncIterator[str], generation: Generation) -> AsyncIterator[str]:
    """The events of a stream, which ends when the model is as it was before."""
    async for event in events:
        yield event
    await asyncio.wrap_future(generation.ended)


def _forget(work: asyncio.Future[Any]) -> None:
    """Ask for the error of what nobody waits for, so that asyncio does not complain of it."""
    if not work.cancelled():
        work.exception()


def _no_route(_: Request, error: Any) -> Response:
    return _refusal(error.status_code, f"{error.detail}; see docs/serving.md for the addresses.")


def _refusal(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error in OpenAI's format."""
    kind = "server_error" if status >= _FAILED else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(body, status_code=status, headers=headers)
