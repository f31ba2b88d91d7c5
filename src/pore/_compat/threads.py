"""Where other threads are in their code: a private function of CPython."""

from __future__ import annotations

import sys
from collections.abc import Iterable


def whereabouts(threads: Iterable[int]) -> list[tuple[int, int]]:
    """Where in its code each of some threads is, by their `get_ident`; none for those that ended.

    `sys._current_frames` is CPython's. A thread that waits stays where it is.
    """
    frames = sys._current_frames()
    found = [frames[thread] for thread in threads if thread in frames]
    return [(id(frame), frame.f_lasti) for frame in found]
