"""Runs the application on a port until a signal comes, and then until all are answered."""

from __future__ import annotations

import asyncio
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


class Server(uvicorn.Server):  # type: ignore[misc]
    """A server that, told to stop, answers what it has begun and refuses what comes then.

    Args:
        app: What answers.
        host: Address to listen at.
        port: Port; 0 takes any that is free.
    """

    def __init__(self, app: CountedApp, host: str = "127.0.0.1", port: int = 0) -> None:
        self.app = app
        config = uvicorn.Config(self.app, host=host, port=port, log_level="warning")
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
            await super().serve(sockets)
        finally:
            waiting.cancel()

    async def _end_when_idle(self) -> None:
        while not (self.app.stopping and self.app.idle):
            await asyncio.sleep(_EVERY)
        self.should_exit = True
