"""Hooks in a model: a tap beside the attention kernel, positions hidden from a layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pore._compat.arguments import POSITIONS
from pore._compat.attention import attention_kernel, attention_name, with_attention
from pore.changes import Changes
from pore.errors import UnsupportedModelError
from pore.tensors.precision import scoring

Kernel = Callable[..., Any]


Observer = Callable[[Tensor, Tensor, "Tensor | None", float, "float | None", bool, Tensor], None]


_names = itertools.count()


def tap_attention(
    changes: Changes,
    module: nn.Module,
    observer: Observer,
    key_bias: Callable[[], Tensor | None] | None = None,
    wanted: Callable[[], bool] | None = None,
) -> None:
    """Show the query, key and value of one attention module to an observer.

    The module gets its own copy of its config, which names a registered function of ours; the
    shared config is not touched. The observer runs outside any autocast and gradient graph.

    Args:
        changes: Undoes the tap at the end.
        module: An attention module of transformers (with `config` and the attention interface).
        observer: Called with query (B, H, q, d), key (B, G, n, d), the attention mask that the
            kernel gets, the scaling and the soft cap of the logits (or None), whether the kernel is
            causal if that mask does not say so, and value (B, G, n, e); called before the kernel.
        key_bias: Returns (B, m) numbers that SDPA adds to the logits of every key, or None for
            nothing; for attention without a mask.
        wanted: Whether the observer should be called now; None means always.

    Raises:
        UnsupportedModelError: The module does not use transformers' attention interface.
    """

    def tapped(  # as transformers names them: Qwen-VL's tower gives the mask by name
        kernel: Kernel,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if wanted is not None and not wanted():
            return kernel(module, query, key, value, attention_mask, *args, **kwargs)
        scaling, causal = kwargs.get("scaling"), kwargs.get("is_causal")
        with scoring():
            observer(
                query,
                key,
                attention_mask,
                query.shape[-1] ** -0.5 if scaling is None else scaling,
                kwargs.get("softcap"),
                getattr(module, "is_causal", True) if causal is None else causal,
                value,
            )
        bias = key_bias() if key_bias is not None else None
        if bias is None:
            return kernel(module, query, key, value, attention_mask, *args, **kwargs)
        # FlashAttention does not take such a mask; every torch has SDPA.
        sdpa = attention_kernel(module, "sdpa")
        assert sdpa is not None
        mask = bias[:, None, None].to(query)
        return sdpa(module, query, key, value, mask, *args, **kwargs)

    between(changes, module, tapped)


def hide_positions(changes: Changes, module: nn.Module) -> None:
    """Hide the positions of tokens from the kernel of an attention module.

    transformers passes them to FlashAttention, which finds packed sequences by them. If tokens were
    dropped it would mistake the gaps for new sequences and ignore the cache; the test also reads
    from the device in every layer. The module itself may need them (Ministral 3 scales queries by
    them).

    Args:
        changes: Undoes this at the end.
        module: The attention module.

    Raises:
        UnsupportedModelError: The module does not use transformers' attention interface.
    """

    def without(kernel: Kernel, *args: Any, **kwargs: Any) -> Any:
        return kernel(module, *args, **{**kwargs, POSITIONS: None})

    between(changes, module, without)


def between(changes: Changes, module: nn.Module, function: Callable[..., Any]) -> None:
    """Put a function between an attention module and its kernel.

    Args:
        changes: Removes it at the end.
        module: The attention module.
        function: Called in place of the kernel, with the kernel in place of the module.
    """
    config: Any = getattr(module, "config", None)
    implementation = attention_name(config)
    if implementation is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no attention implementation in its config, so its "
            "attention cannot be read; pore needs transformers' attention interface."
        )
    kernel = attention_kernel(module, implementation)
    if kernel is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no eager attention that pore can find; load the model "
            "with attn_implementation='sdpa'."
        )

    def called(of: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # FlashAttention looks its own name up in the config of the module.
        held = vars(of)
        own = held["config"]
        try:
            held["config"] = config
            return function(kernel, *args, **kwargs)
        finally:
            held["config"] = own  # here no interrupt can come between

    # The suffix keeps checks such as `"flash" in name` of modules true for the copy.
    name = f"{implementation}_pore{next(_names)}"
    changes.kernel(name, called)
    changes.put(module, "config", with_attention(config, name))
