"""Web applications with one address whose requests are counted, and refused in words."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pore.errors import ModelStateError, PoreError
from pore.serving.requests import RequestError
from pore.serving.served import Gone, Served

_log = logging.getLogger(__name__)

_BAD, _GONE, _FAILED = 400, 499, 500

UNAVAILABLE = 503

# The scope's key for what a request has begun.
_WORK = "pore.work"


class Work(Protocol):
    """What a request has begun, which nobody needs any more once the request has ended."""

    def cancel(self) -> None:
        """Do no more; without effect once all is done."""


class CountedApp:
    """An application, as ASGI servers call it.

    Requests for its one address that asks the model are counted, and refused where too many wait or
    the server is to stop.

    Args:
        served: The model.
        address: The path that asks it.
        routes: All that is there.

    Attributes:
        served: The model.
        stopping: Whether new requests are refused, because the server is to stop.
    """

    def __init__(self, served: Served, address: str, routes: Sequence[Route]) -> None:
        self.served = served
        self.stopping = False
        self._address = address
        self._app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})

    @property
    def idle(self) -> bool:
        """Whether no request is being answered or waits."""
        return self.served.metrics.in_flight == 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, and count it if it asks the model."""
        if scope["type"] != "http" or scope["path"] != self._address:
            await self._app(scope, receive, send)
            return
        metrics = self.served.metrics
        reason = self._unavailable()
        if reason is not None:
            metrics.turn_away(UNAVAILABLE)
            again = {"retry-after": "1", "connection": "close"}
            await _refusal(UNAVAILABLE, reason, again)(scope, receive, send)
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
            work: Work | None = scope.get(_WORK)
            if work is not None:
                work.cancel()

    def _unavailable(self) -> str | None:
        """Why no request is taken now; None if one is."""
        if self.stopping:
            return "The server is stopping; ask another one."
        if self.served.metrics.in_flight >= self.served.limits.waiting:
            return f"{self.served.limits.waiting} requests wait already; try again later."
        return None


async def answered(answer: Awaitable[Response]) -> Response:
    """A response; where it fails, the refusal that says why.

    Args:
        answer: What makes it.

    Returns:
        The response.
    """
    try:
        return await answer
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


def begun(request: Request, work: Work) -> None:
    """Have what a request has begun cancelled when the request ends, however it does.

    Args:
        request: The request.
        work: What it has begun.
    """
    request.scope[_WORK] = work


async def body(request: Request, most: int) -> bytes:
    """The body of a request.

    Args:
        request: The request.
        most: Its largest number of bytes.

    Returns:
        All of it.

    Raises:
        RequestError: It is larger.
    """
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise RequestError(f"The request has more than {most} bytes; send smaller images.", 413)
    return bytes(data)


async def unless_gone(request: Request, answer: Awaitable[Any]) -> Any:
    """An answer, if the client waits for it.

    Args:
        request: The request, whose body was read.
        answer: What is waited for.

    Returns:
        The answer.

    Raises:
        Gone: The client went away before it was there.
    """
    work = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(request.receive())
    await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
        work.add_done_callback(_forget)
        raise Gone
    leaving.cancel()
    return work.result()


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
