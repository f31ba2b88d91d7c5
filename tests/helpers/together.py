"""Several processes of a job as threads of this one, which take turns and meet in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pore._processes import Processes

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class _Meeting:
    """Where the threads meet."""

    barrier: threading.Barrier
    turn: Any = field(default_factory=threading.Lock)
    brought: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Thread(Processes):
    """One of the threads."""

    meeting: _Meeting | None = None

    def meet(self, action: Callable[[], _Value]) -> list[_Value]:
        assert self.meeting is not None

        def in_turn() -> _Value:  # a model's hooks are for one at a time
            with self.meeting.turn:
                return action()

        return super().meet(in_turn)

    def _exchanged(self, value: Any) -> list[Any]:
        assert self.meeting is not None
        self.meeting.brought[self.rank] = value
        self.meeting.barrier.wait(20)
        found = [self.meeting.brought[rank] for rank in range(self.size)]
        self.meeting.barrier.wait(20)
        return found


def together(size: int, call: Callable[[Processes], _Value]) -> list[_Value | BaseException]:
    """What every one of some processes returns or raises, by rank.

    Args:
        size: How many.
        call: What each does.
    """
    meeting = _Meeting(threading.Barrier(size))

    def one(rank: int) -> _Value | BaseException:
        try:
            return call(Thread(rank, size, meeting))
        except BaseException as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
