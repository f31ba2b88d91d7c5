"""Where a `torch.nn.Module` keeps its hooks, its call and its state, and what wraps a model.

torch promises `register_forward_hook` and similar methods. It promises no way to add a hook so that
after an interrupt (Ctrl-C) it is either there with its handle or not there at all, and no way to
see or replace what `module(...)` runs."""

from __future__ import annotations

from typing import Any

from torch import nn

BEFORE, AFTER = "_forward_pre_hooks", "_forward_hooks"

HOOKS = {
    BEFORE: ("_forward_pre_hooks_with_kwargs",),
    AFTER: ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}
"""Where torch keeps the hooks of a module by number, and by the same number how to call each.

`register_forward_hook` returns a handle that removes a hook, but only after adding the hook: an
interrupt may come between."""

STATE = "__getstate__"
"""The method that says what copies and pickles of a module hold; Python looks in the object first.

`copy.copy`, `copy.deepcopy` and `pickle` all call it, through `object.__reduce_ex__`."""

CALL = "_call_impl"
"""The method behind `__call__` of a module: its hooks, with the forward between them.

torch runs hooks after an exception too if they ask for it, but not after Ctrl-C."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that transformers made, without the wrappers of torch.compile and peft.

    `_orig_mod` is the module that `torch.compile` compiled.
    """
    wrapped: Any = model
    if hasattr(wrapped, "_orig_mod"):
        wrapped = wrapped._orig_mod
    if hasattr(wrapped, "get_base_model"):
        wrapped = wrapped.get_base_model()
    return wrapped  # type: ignore[no-any-return]
