"""Attention kernels ("sdpa", "eager", "flash_attention_2"): which a config names, how to call it.

Kernels can be registered publicly, with `AttentionInterface.register`. Which kernel a module uses,
what its function is, and taking a name back are private."""

from __future__ import annotations

import copy
import inspect
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

_EAGER = "eager_attention_forward"
ADDING = ("sdpa", "eager")
"""The kernels that add a 4-D mask of floats to the logits."""


def attention_name(config: Any) -> str | None:
    """The name of the attention kernel that a config asks for, such as "sdpa".

    Modules read it from `_attn_implementation` at every call. None if there is none.
    """
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


def uses_flash(config: Any) -> bool:
    """Whether that kernel works like FlashAttention: 2-D masks or none, tokens in order."""
    return "flash" in str(attention_name(config))


def with_attention(config: Any, name: str) -> Any:
    """A copy of a config that asks for another attention kernel.

    `_attn_implementation` is a property, which checks a name and passes it to sub-configs; its
    value is stored in `_attn_implementation_internal`.
    """
    own = copy.copy(config)
    own._attn_implementation_internal = name
    return own


def attention_kernel(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """The kernel with a name, as an attention module calls it; None if it cannot be found.

    Eager attention is not in `ALL_ATTENTION_FUNCTIONS`: every model file has its own function
    `eager_attention_forward`. Llama 4 has another for its tower, whose name has the same ending;
    the module's `forward` names the one that it uses.
    """
    if name != "eager":
        kernel: Callable[..., Any] = _kernels()[name]
        return kernel
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    used = getattr(code, "co_names", ())
    eager = next((own for own in used if own.endswith(_EAGER)), _EAGER)
    for base in type(module).__mro__:
        found = getattr(sys.modules[base.__module__], eager, None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


def register_attention(name: str, kernel: Callable[..., Any]) -> Callable[[], None]:
    """Make a kernel known by a name to all models; the function returned undoes that.

    The name keeps neither the kernel nor its model alive, and vanishes with the kernel.
    """

    def gone(_: object) -> None:
        forget_attention(name)

    held = weakref.ref(kernel, gone)

    def registered(*args: Any, **kwargs: Any) -> Any:
        kernel = held()
        assert kernel is not None
        return kernel(*args, **kwargs)

    _kernels().register(name, registered)
    return partial(forget_attention, name)


def forget_attention(name: str) -> None:
    """Make one of our names unknown again, if it is known.

    Registering is public, undoing it is not: `del` only removes what one model file overrides, and
    `_global_mapping` is what all of them share.
    """
    _kernels()._global_mapping.pop(name, None)


def _kernels() -> Any:
    # Imported late: it takes transformers seconds, which `import pore` should not.
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def kernel_names() -> list[str]:
    """The names of all attention kernels and of the functions that make masks for them."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return [*sorted(_kernels().keys()), *sorted(ALL_MASK_ATTENTION_FUNCTIONS.keys())]


def layer_number(attention: nn.Module) -> int:
    """Which layer of the cache an attention module fills: `layer_idx`."""
    number: int = attention.layer_idx  # type: ignore[assignment]
    return number
