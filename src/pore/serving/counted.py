"""Web applications with one address whose requests are counted, and refused in words."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pore.errors import ModelStateError, PoreError
from pore.serving.requests import RequestError
from pore.serving.served import Gone, Served

_log = logging.getLogger(__name__)

_BAD, _SLOW, _LARGE, _GONE, _FAILED = 400, 408, 413, 499, 500

UNAVAILABLE = 503

_EVERY = 0.1  # seconds between looks at whether a request that is coming is still wanted

# The scope's keys for what a request has begun, and for its body.
_WORK, _BODY = "pore.work", "pore.body"


_STOPPING = "The server is stopping; ask another one."


class Work(Protocol):
    """What a request has begun, which nobody needs any more once the request has ended."""

    def cancel(self) -> object:
        """Do no more; without effect once all is done."""


class CountedApp:
    """An application, as ASGI servers call it.

    Requests for its one address that asks the model are counted once they have come in full, and
    refused where too many wait or the server is to stop.

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
        try:
            self._check_available()
            limits = self.served.limits
            data = await received(receive, limits.body_bytes, limits.body_seconds, self._stops)
            # One that is still coming keeps nobody out and does not wait, so it is asked again.
            self._check_available()
        except (Gone, RequestError) as error:
            status = error.status if isinstance(error, RequestError) else _GONE
            metrics.turn_away(status)
            more = {"retry-after": "1"} if status == UNAVAILABLE else {}
            # What has not come yet of the request is not read any more.
            refusal = _refusal(status, str(error), {**more, "connection": "close"})
            await refusal(scope, receive, send)
            return
        await self._counted({**scope, _BODY: data}, receive, send)

    async def _counted(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request that has come in full."""
        metrics, status = self.served.metrics, _GONE

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

    def _stops(self) -> bool:
        return self.stopping

    def _check_available(self) -> None:
        """Refuse a request where none is taken now."""
        if self.stopping:
            raise RequestError(_STOPPING, UNAVAILABLE)
        if self.served.metrics.in_flight >= self.served.limits.waiting:
            raise RequestError(
                f"{self.served.limits.waiting} requests wait already; try again later.", UNAVAILABLE
            )


async def answered(answer: Awaitable[Response]) -> Response:
    """A response; where it fails, the refusal that says why.

    Args:
        answer: What makes it.

    Returns:
        The response.
    """
    try:
        return await answer
    except Gone:
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


def body(request: Request) -> bytes:
    """The body of a request.

    Args:
        request: A request that a `CountedApp` has counted.

    Returns:
        All of it.
    """
    data: bytes = request.scope[_BODY]
    return data


async def received(
    receive: Callable[[], Awaitable[Any]],
    most: int,
    seconds: float,
    unwanted: Callable[[], bool] = lambda: False,
) -> bytes:
    """The body of a request that is coming.

    Args:
        receive: Gives the messages of the request, as ASGI servers do.
        most: Its largest number of bytes.
        seconds: How long it may take.
        unwanted: Says that nobody takes it any more, because the server is to stop.

    Returns:
        All of it.

    Raises:
        RequestError: It is larger, or slower, or unwanted.
        Gone: The client went away.
    """
    data, end = bytearray(), time.monotonic() + seconds
    coming: asyncio.Future[Any] | None = None
    while True:
        coming = coming or asyncio.ensure_future(receive())
        await asyncio.wait({coming}, timeout=_EVERY)
        error = None
        if unwanted():
            error = RequestError(_STOPPING, UNAVAILABLE)
        elif time.monotonic() > end:
            error = RequestError(f"The request did not come in {seconds:g} seconds.", _SLOW)
        if error is not None:
            coming.cancel()
            raise error
        if not coming.done():
            continue
        message, coming = coming.result(), None
        if message["type"] == "http.disconnect":
            raise Gone
        data += message.get("body", b"")
        if len(data) > most:
            raise RequestError(
                f"The request has more than {most} bytes; send smaller images.", _LARGE
            )
        if not message.get("more_body", False):
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
