"""Interrupts at every place of the code that runs: lines, bytecodes, calls and returns."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch

Place = tuple[CodeType, int, str]
"""The code, the offset of the bytecode in it, and the kind of event that a trace sees there."""


def places(
    action: Callable[[], object], files: tuple[str, ...] = ("",), opcodes: bool = True
) -> Counter[Place]:
    """How often an action reaches every place in files with one of these words in their path."""
    found: Counter[Place] = Counter()

    def trace(frame: Any, event: str, _: Any) -> Any:
        if not any(word in frame.f_code.co_filename for word in files):
            return None
        frame.f_trace_opcodes = opcodes
        found[frame.f_code, frame.f_lasti, event] += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return found


def interrupted(
    action: Callable[[], object], place: Place, time: int, error: type[BaseException]
) -> BaseException | None:
    """Raise an error when an action reaches a place for the nth time.

    Returns:
        The error that the action raised; None if it ended normally, for instance because it never
        reached the place.
    """
    code, offset, kind = place
    left = time

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code is not code:
            return None
        frame.f_trace_opcodes = kind == "opcode"
        if frame.f_lasti == offset and event == kind:
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise error
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except error as raised:
        return raised
    finally:
        sys.settrace(before)
    return None


def whole_state(model: torch.nn.Module) -> list[Any]:
    """What the modules of a model hold, by identity, with their hooks, and all kernels."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: list[Any] = [sorted(ALL_ATTENTION_FUNCTIONS)]
    for module in model.modules():
        held = vars(module)
        named = [(key, value) for key, value in held.items() if "hooks" in key]
        hooks = [(key, tuple(value)) for key, value in named if isinstance(value, dict)]
        found.append((type(module), {key: id(value) for key, value in held.items()}, hooks))
    return found
