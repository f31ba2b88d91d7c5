"""Gradient checkpointing: the function with which a layer of transformers does it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

CHECKPOINT = "_gradient_checkpointing_func"
"""The attribute of a layer that holds the function to which its `__call__` is passed in training.

That function keeps none of the layer's states. The backward pass calls the layer once more, with
its hooks, long after the forward has ended."""


def checkpointed(layer: nn.Module) -> bool:
    """Whether a layer's next call goes through its `CHECKPOINT`."""
    return layer.training and getattr(layer, "gradient_checkpointing", False)


def before_checkpoint(
    act: Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None],
    checkpoint: Callable[..., Any],
) -> Callable[..., Any]:
    """A `CHECKPOINT` that runs a pre-hook in the forward, and not again in the backward.

    Args:
        act: A forward pre-hook, called with the arguments and keyword arguments (not the module).
        checkpoint: The layer's own `CHECKPOINT`. It is called with a partial of the layer's call
            and its keyword arguments, and with the arguments.
    """

    def outside(call: Any, *args: Any, **kwargs: Any) -> Any:
        changed = act(args, call.keywords)
        if changed is not None:
            args, keywords = changed
            call = partial(call.func, *call.args, **keywords)
        return checkpoint(call, *args, **kwargs)

    return outside
