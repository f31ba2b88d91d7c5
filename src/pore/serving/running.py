"""Runs the application on a port until a signal comes, and then until all are answered."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from pore.errors import InputError

try:
    import uvicorn

    from pore.serving.counted import CountedApp
except ImportError as error:
    raise InputError(
        f"Serving needs web libraries: pip install 'pore-vlm[serve]', or 'pore-vlm[ui]' for the "
        f"page alone (missing: {error.name})."
    ) from error

_EVERY = 0.1  # seconds between looks at whether all are answered


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """An address that is taken while a model is loaded, so that nobody waits for a refusal.

    Args:
        host: Address to listen at.
        port: Port.

    Yields:
        Its sockets, one for every address that the host's name means.

    Raises:
        InputError: It is taken already, or is none of this machine.
    """
    with contextlib.ExitStack() as opened:
        sockets = []
        try:
            kinds = (socket.AF_UNSPEC, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)
            for family, kind, protocol, _, at in socket.getaddrinfo(host, port, *kinds):
                one = opened.enter_context(socket.socket(family, kind, protocol))
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind(at)
                sockets.append(one)
        except (OSError, UnicodeError) as error:
            raise _not_there(host, port, error) from error
        yield sockets


def _not_there(host: str, port: int, error: Exception) -> InputError:
    said = getattr(error, "strerror", None) or error
    return InputError(
        f"Nothing can listen at {host}:{port}: {said}. Choose another --port or --host, or stop "
        "what listens there."
    )


class Server(uvicorn.Server):  # type: ignore[misc]
    """A server that, told to stop, answers what it has begun and refuses what comes then.

    Args:
        app: What answers.
        sockets: Where it listens; the default is any port of 127.0.0.1 that is free.
    """

    def __init__(self, app: CountedApp, sockets: Sequence[socket.socket] | None = None) -> None:
        self.app = app
        self._at = sockets
        config = uvicorn.Config(self.app, port=0, log_level="warning")
        super().__init__(config)

    def stop(self) -> None:
        """Refuse new requests from now on, and end once all others are answered."""
        self.app.stopping = True

    def handle_exit(self, sig: int, frame: Any) -> None:
        """What uvicorn calls on SIGINT and SIGTERM; the second one stops at once."""
        if self.app.stopping:
            self.should_exit = self.force_exit = True
        self.stop()

    async def serve(self, sockets: Any = None) -> None:
        """Serve until stopped."""
        waiting = asyncio.create_task(self._end_when_idle())
        try:
            await super().serve(sockets or self._at)
        except OSError as error:
            if self.started or not self._at:
                raise
            # Another one, which was begun at the same time, was faster.
            host, port, *_ = self._at[0].getsockname()
            raise _not_there(host, port, error) from error
        finally:
            waiting.cancel()

    async def _end_when_idle(self) -> None:
        while not (self.app.stopping and self.app.idle):
            await asyncio.sleep(_EVERY)
        self.should_exit = True
