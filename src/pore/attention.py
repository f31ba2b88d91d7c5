"""One row of attention from one layer, whatever kernel computes the rest.

Every attention module of transformers hands its final query and key (after q/k-norm, RoPE and the
cache) to the function that `ALL_ATTENTION_FUNCTIONS` holds under the name in its config. A tap puts
a function in between for one module: it looks at query and key, then calls the original kernel. So
SDPA, FlashAttention and eager stay as they are, and only one query row is computed beside them.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pore.errors import ScoreError, UnsupportedModelError

Normalize = Literal["prompt", "visual"]
Observer = Callable[[Tensor, Tensor, "Tensor | None", float, "float | None"], None]

_names = itertools.count()


def check_normalize(normalize: str) -> None:
    """Refuse an unknown normalisation.

    Args:
        normalize: What the softmax of text-visual attention runs over.

    Raises:
        ScoreError: It is neither "prompt" nor "visual".
    """
    if normalize not in get_args(Normalize):
        raise ScoreError(f"normalize must be 'prompt' or 'visual', not {normalize!r}.")


class AttentionTap:
    """Shows the query and key of one attention module to an observer, until removed.

    The module gets its own copy of its config, which names a registered function of ours; the
    shared config is not touched.

    Args:
        module: An attention module of transformers (with `config` and the attention interface).
        observer: Called with query (B, H, q, d), key (B, G, n, d), the attention mask that the
            kernel gets, the scaling and the soft cap of the logits (or None), before the kernel.

    Raises:
        UnsupportedModelError: The module does not use transformers' attention interface.
    """

    def __init__(self, module: nn.Module, observer: Observer) -> None:
        config: Any = getattr(module, "config", None)
        implementation = getattr(config, "_attn_implementation", None)
        if implementation is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} has no attention implementation in its config, so its "
                "attention cannot be read; pore needs transformers' attention interface."
            )
        self._module = module
        self._config = config
        # The suffix keeps checks such as `"flash" in name` of modules true for the copy.
        self._name = f"{implementation}_pore{next(_names)}"
        kernel = _kernel(module, implementation)

        def tapped(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            scaling = kwargs.get("scaling")
            observer(
                query,
                key,
                attention_mask,
                query.shape[-1] ** -0.5 if scaling is None else scaling,
                kwargs.get("softcap"),
            )
            return kernel(module, query, key, value, attention_mask, *args, **kwargs)

        self._registry = _registry()
        self._registry.register(self._name, tapped)
        own = copy.copy(config)
        # Past the property of the same name, which validates and spreads to sub-configs.
        own._attn_implementation_internal = self._name
        module.config = own

    def remove(self) -> None:
        """Give the module its config back and forget the function."""
        self._module.config = self._config
        self._registry._global_mapping.pop(self._name, None)


def _registry() -> Any:
    # Imported late: it takes transformers seconds, which `import pore` should not.
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def _kernel(module: nn.Module, implementation: str) -> Callable[..., Any]:
    if implementation != "eager":
        kernel: Callable[..., Any] = _registry()[implementation]
        return kernel
    # Eager attention lives beside each model's own modules.
    for base in type(module).__mro__:
        found = getattr(sys.modules[base.__module__], "eager_attention_forward", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise UnsupportedModelError(
        f"{type(module).__name__} has no eager attention that pore can find; load the model with "
        "attn_implementation='sdpa'."
    )


def last_row_logits(
    query: Tensor,
    key: Tensor,
    *,
    last: Tensor,
    valid: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention logits of one query per sample to all keys, at least in float32.

    Args:
        query: (B, H, q, d) queries.
        key: (B, G, m, d) keys, G dividing H; slots behind the cached ones may be empty.
        last: (B,) which of the q queries to take.
        valid: (B, n) bool, False at padding, n <= m.
        mask: The kernel's mask: None, (B or 1, 1 or H, q, m') bool or additive, or (B, n).
        scaling: Factor on the logits.
        softcap: Cap of the logits (Gemma 2), or None.

    Returns:
        (B, H, n) logits, -inf where the query must not look.
    """
    batch, heads, _, width = query.shape
    n = valid.shape[-1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows = torch.arange(batch, device=query.device)
    last = last.to(query.device)
    row = query[rows, :, last].to(dtype)
    groups = key.shape[1]
    grouped = row.view(batch, groups, heads // groups, width)
    logits = torch.matmul(grouped, key[:, :, :n].to(dtype).transpose(-1, -2)) * scaling
    logits = logits.view(batch, heads, n)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    allowed = valid.to(query.device)
    # Queries are the last of the n slots; what comes after the one taken is its future.
    slot = n - query.shape[2] + last
    allowed = allowed & (torch.arange(n, device=query.device) <= slot[:, None])
    if isinstance(mask, Tensor) and mask.dim() == 4:
        seen = mask.expand(batch, *mask.shape[1:])[rows, :, last, :n]
        allowed = allowed[:, None, :] & (seen if seen.dtype == torch.bool else seen > -1e4)
    else:
        allowed = allowed[:, None, :]
    return logits.masked_fill(~allowed, -torch.inf)


def text_visual_attention(
    logits: Tensor, rows: Tensor, columns: Tensor, valid: Tensor, normalize: Normalize = "prompt"
) -> Tensor:
    """Attention of the last text token to the visual tokens of every image, averaged over heads.

    PoRe Eq. 1. With `normalize="prompt"` each head's softmax runs over the whole prompt, as in the
    released code of FastV and PoRe; with "visual" over the image's visual tokens alone, as Eq. 1 is
    printed. Per head they differ by a factor, so the head mean and its ranking can differ.

    Args:
        logits: (B, H, n) attention logits of the last text token, -inf where it does not look.
        rows: (I,) the sample of every image.
        columns: (I, t) positions of the image's visual tokens in the sequence.
        valid: (I, t) bool, False where a smaller image is filled up.
        normalize: "prompt" or "visual".

    Returns:
        (I, t) attention in the dtype of `logits`; 0 where not `valid`.
    """
    rows, columns, valid = (x.to(logits.device) for x in (rows, columns, valid))
    heads = logits.shape[1]
    weights = logits.softmax(-1)[rows] if normalize == "prompt" else logits[rows]
    picked = weights.gather(-1, columns[:, None].expand(-1, heads, -1))
    if normalize == "visual":
        picked = picked.masked_fill(~valid[:, None], -torch.inf).softmax(-1)
    return picked.mean(1).masked_fill(~valid, 0.0)


def cls_attention(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Attention of the CLS token of a vision tower to the patches, per head.

    Args:
        query: (I, H, N + 1, d) queries, CLS first.
        key: (I, H, N + 1, d) keys.
        scaling: Factor on the logits.

    Returns:
        (I, H, N) weights after a softmax over CLS and patches, at least float32; the CLS token's
        own column is cut off without renormalising.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = torch.matmul(query[:, :, :1].to(dtype), key.to(dtype).transpose(-1, -2)) * scaling
    return logits.softmax(-1)[:, :, 0, 1:]
