"""The place in the code where other threads are: a private function of CPython."""

from __future__ import annotations

import sys
from collections.abc import Iterable


def whereabouts(threads: Iterable[int]) -> list[tuple[int, int]]:
    """The place in the code of each thread, given by `get_ident`; none for threads that ended.

    `sys._current_frames` is CPython's. The place of a waiting thread does not change.
    """
    frames = sys._current_frames()
    found = [frames[thread] for thread in threads if thread in frames]
    return [(id(frame), frame.f_lasti) for frame in found]
