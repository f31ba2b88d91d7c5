"""One row of attention from one layer, whatever kernel computes the rest.

Every attention module of transformers hands its final query and key (after q/k-norm, RoPE and the
cache) to the function that `ALL_ATTENTION_FUNCTIONS` holds under the name in its config. A tap puts
a function in between for one module: it reads query and key, and then calls the original kernel. So
SDPA, FlashAttention and eager stay unchanged, and only one query row is computed in addition.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pore.errors import ScoreError
from pore.tensors.gathering import widened

Normalize = Literal["prompt", "visual"]


_LOGITS = 1 << 22  # of one image and head, that received attention holds at a time: 16 MB


def check_normalize(normalize: str) -> None:
    """Refuse an unknown normalisation.

    Args:
        normalize: What the softmax of text-visual attention runs over.

    Raises:
        ScoreError: It is neither "prompt" nor "visual".
    """
    if normalize not in get_args(Normalize):
        raise ScoreError(f"normalize must be 'prompt' or 'visual', not {normalize!r}.")


def row_logits(
    query: Tensor,
    key: Tensor,
    *,
    rows: Tensor | None,
    index: Tensor,
    valid: Tensor,
    mask: Any,
    scaling: float,
    softcap: float | None = None,
    causal: bool = True,
    window: int | None = None,
) -> Tensor:
    """Attention logits of some queries to all keys, at least in float32.

    Args:
        query: (B, H, q, d) queries.
        key: (B, G, m, d) keys, G dividing H; slots after the cached ones may be empty.
        rows: (I,) the samples to take, in any order and number; None takes each once.
        index: (I, R) which of the q queries to take of each.
        valid: (B, n) bool, False at padding, n <= m.
        mask: The kernel's mask: (B or 1, 1 or H, q, m') bool or additive, or FlexAttention's, which
            then says all, and is added where it is additive; or None or (B, n), and the kernel is
            causal or sees all.
        scaling: Factor on the logits.
        softcap: Cap of the logits (Gemma 2), or None.
        causal: Whether the kernel is causal.
        window: Tokens that the kernel's sliding window shows; None for all.

    Returns:
        (I, H, R, n) logits, -inf where the query must not look.
    """
    device = query.device
    batch, heads, length, width = query.shape
    n = valid.shape[-1]
    index = index.to(device)
    sample = torch.arange(batch, device=device) if rows is None else rows.to(device)
    count, taken = index.shape
    picked = widened(query[sample[:, None], :, index].transpose(1, 2))  # (I, H, R, d)
    keys = key[:, :, :n] if rows is None else key[sample, :, :n]
    groups = key.shape[1]
    grouped = picked.reshape(count, groups, heads // groups * taken, width)
    logits = torch.matmul(grouped, keys.to(picked.dtype).transpose(-1, -2)) * scaling
    logits = logits.view(count, heads, taken, n)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    allowed = valid.to(device)[sample, None, None]
    if hasattr(mask, "mask_mod"):  # FlexAttention's
        slots, head = torch.arange(n, device=device), sample.new_zeros(())
        seen = mask.mask_mod(sample[:, None, None], head, index[..., None], slots)
        allowed = allowed & seen[:, None]
    elif isinstance(mask, Tensor) and mask.dim() == 4:
        seen = mask.expand(batch, *mask.shape[1:])[sample[:, None], :, index, :n].transpose(1, 2)
        if seen.dtype != torch.bool:
            # What is open may count more or less, as merged tokens do.
            seen, more = seen > -1e4, seen
            logits = logits + more.masked_fill(~seen, 0.0).to(logits.dtype)
        allowed = allowed & seen
    else:
        # Queries are the last of the n slots; what comes after the one taken is its future.
        back = (n - length + index)[..., None] - torch.arange(n, device=device)
        back = back if causal else back.abs()
        near = back >= 0 if window is None else (back >= 0) & (back < window)
        allowed = allowed & near[:, None]
    return logits.masked_fill(~allowed, -torch.inf)


def visual_weights(
    logits: Tensor, columns: Tensor, valid: Tensor, normalize: Normalize = "prompt"
) -> Tensor:
    """The attention weights of some tokens on the visual tokens of every image, in every head.

    With `normalize="prompt"` each head's softmax runs over the whole prompt, as in the released
    code of FastV and PoRe; with "visual" over the image's visual tokens alone, as PoRe's Eq. 1 is
    printed. Per head they differ by a factor, so the head mean and its ranking can differ.

    Args:
        logits: (I, H, R, n) attention logits of R tokens of every image's sample, -inf where they
            do not look.
        columns: (I, t) positions of the image's visual tokens among the n.
        valid: (I, t) bool, False where a smaller image is filled up.
        normalize: "prompt" or "visual".

    Returns:
        (I, H, R, t) weights in the dtype of `logits`; 0 where not `valid`.
    """
    columns, valid = columns.to(logits.device), valid.to(logits.device)
    weights = logits.softmax(-1) if normalize == "prompt" else logits
    picked = weights.gather(-1, columns[:, None, None].expand(*logits.shape[:3], -1))
    nothing = ~valid[:, None, None]
    if normalize == "visual":
        picked = picked.masked_fill(nothing, -torch.inf).softmax(-1)
    return picked.masked_fill(nothing, 0.0)


def cls_attention(query: Tensor, key: Tensor, scaling: float, real: Tensor | None = None) -> Tensor:
    """Attention of the CLS token of a vision tower to itself and the patches, per head.

    Args:
        query: (I, H, N + 1, d) queries, CLS first.
        key: (I, H, N + 1, d) keys.
        scaling: Factor on the logits.
        real: (I, N + 1) bool, False at padding; None where there is none.

    Returns:
        (I, H, N + 1) weights after a softmax over CLS and patches, at least float32.
    """
    logits = torch.matmul(widened(query[:, :, :1]), widened(key).transpose(-1, -2)) * scaling
    if real is not None:
        logits = logits.masked_fill(~real[:, None, None], -torch.inf)
    return logits.softmax(-1)[:, :, 0]


def mean_attention(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Attention of the mean query of a picture to its tokens, per head.

    Args:
        query: (I, H, n, d) queries of all patches.
        key: (I, H, N, d) keys of tokens, each the mean of its patches'.
        scaling: Factor on the logits.

    Returns:
        (I, H, N) weights after a softmax over the tokens, at least float32.
    """
    mean = widened(query).mean(2, keepdim=True)
    return (torch.matmul(mean, widened(key).mT) * scaling).softmax(-1)[:, :, 0]


def received_attention(
    query: Tensor, key: Tensor, scaling: float, real: Tensor | None = None
) -> Tensor:
    """Attention that every patch receives from all patches, per head: for towers without CLS.

    Args:
        query: (I, H, N, d) queries.
        key: (I, H, N, d) keys.
        scaling: Factor on the logits.
        real: (I, N) bool, False at padding, which neither looks nor is seen; None where there is
            none.

    Returns:
        (I, H, N) mean over the queries of the weights, at least float32; they sum to one.
    """
    images, _, n, _ = key.shape
    rows = max(_LOGITS // n, 1)
    heads = []
    for q, k in zip(query.unbind(1), key.unbind(1), strict=True):
        q, k = widened(q), widened(k)
        means = k.new_zeros(images, n)
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            logits = torch.matmul(q[:, part], k.mT) * scaling
            if rows >= n:
                means = mean_over_queries(logits, real)
            elif real is None:
                means += logits.softmax(-1).sum(1) / n
            else:
                weights = logits.masked_fill(~real[:, None], -torch.inf).softmax(-1)
                means += (weights * real[:, part, None]).sum(1) / real.sum(1, keepdim=True)
        heads.append(means)
    return torch.stack(heads, 1)


def mean_over_queries(logits: Tensor, real: Tensor | None = None) -> Tensor:
    """Weights that every key receives, averaged over the queries.

    Args:
        logits: (I, Q, n) logits, of all n tokens or of some that are no padding.
        real: (I, n) bool, False at padding, which neither looks nor is seen; None where there is
            none.

    Returns:
        (I, n) means; they sum to one.
    """
    if real is None:
        return logits.softmax(-1).mean(1)
    weights = logits.masked_fill(~real[:, None], -torch.inf).softmax(-1)
    if weights.shape[1] < real.shape[1]:
        return weights.mean(1)
    return (weights * real[..., None]).sum(1) / real.sum(1, keepdim=True)


def visible(mask: Tensor | None, images: int) -> Tensor | None:
    """Which tokens of a vision tower are visible under the mask of its kernel.

    Args:
        mask: (I or 1, 1, n, n) bool or additive, or (I, n), or None.
        images: I.

    Returns:
        (I, n) bool, False at padding; None where all are seen.
    """
    if mask is None:
        return None
    if mask.dim() == 4:
        mask = (mask if mask.dtype == torch.bool else mask > -1e4)[:, 0].any(1)
    seen = mask.bool().expand(images, -1)
    return None if bool(seen.all()) else seen
