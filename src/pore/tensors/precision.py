"""Scores are computed without the surrounding autocast and graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Leave `torch.autocast`, on every device: tensors are multiplied in the types that they have.

    For code that makes new features from scores. Code that only scores uses `scoring`.
    """
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
    with ExitStack() as stack:
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def scoring() -> Iterator[None]:
    """`full_precision`, and no graph: gradients go through what is kept, not through the choice."""
    with full_precision(), torch.no_grad():
        yield


def autocast_of_now(kind: str) -> Callable[[], torch.autocast]:
    """Remember the current autocast, on or off, for code that is to run in it later.

    Args:
        kind: The kind of device, such as "cuda".
    """
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return partial(torch.autocast, kind, dtype, enabled)
