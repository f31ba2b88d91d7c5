"""Points in time on a device."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Points in time on a device: events of the CUDA stream, or else the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def synchronize(self) -> None:
        """Wait until the device has finished all its work."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def now(self) -> float:
        """Wall-clock time in ms, once the device has finished all its work."""
        self.synchronize()
        return time.perf_counter() * 1e3

    def mark(self) -> Any:
        """A point in time; on CUDA without waiting, so that kernels are still launched ahead."""
        if self._device.type != "cuda":
            return self.now()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks, once the device has finished all its work."""
        if self._device.type != "cuda":
            return float(end - start)
        return float(start.elapsed_time(end))
