"""One row of attention from one layer, whatever kernel computes the rest.

Every attention module of transformers hands its final query and key (after q/k-norm, RoPE and the
cache) to the function that `ALL_ATTENTION_FUNCTIONS` holds under the name in its config. A tap puts
a function in between for one module: it looks at query and key, then calls the original kernel. So
SDPA, FlashAttention and eager stay as they are, and only one query row is computed beside them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pore._private import POSITIONS, attention_kernel, attention_name, with_attention
from pore.changes import Changes
from pore.errors import ScoreError, UnsupportedModelError
from pore.layout import Layout
from pore.precision import scoring

Normalize = Literal["prompt", "visual"]
Kernel = Callable[..., Any]
Observer = Callable[[Tensor, Tensor, "Tensor | None", float, "float | None", bool], None]

_names = itertools.count()
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


def tap_attention(
    changes: Changes,
    module: nn.Module,
    observer: Observer,
    key_bias: Callable[[], Tensor | None] | None = None,
) -> None:
    """Show the query and key of one attention module to an observer.

    The module gets its own copy of its config, which names a registered function of ours; the
    shared config is not touched. The observer reads out of any autocast and graph.

    Args:
        changes: What takes it back.
        module: An attention module of transformers (with `config` and the attention interface).
        observer: Called with query (B, H, q, d), key (B, G, n, d), the attention mask that the
            kernel gets, the scaling and the soft cap of the logits (or None), and whether the
            kernel is causal where that mask does not say; before the kernel.
        key_bias: Gives (B, m) to be added to the logits of every key, by SDPA, or None for nothing;
            for attention without a mask.

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
        scaling, causal = kwargs.get("scaling"), kwargs.get("is_causal")
        with scoring():
            observer(
                query,
                key,
                attention_mask,
                query.shape[-1] ** -0.5 if scaling is None else scaling,
                kwargs.get("softcap"),
                getattr(module, "is_causal", True) if causal is None else causal,
            )
        bias = key_bias() if key_bias is not None else None
        if bias is None:
            return kernel(module, query, key, value, attention_mask, *args, **kwargs)
        # FlashAttention takes no such mask; SDPA is what every torch has.
        sdpa = attention_kernel(module, "sdpa")
        assert sdpa is not None
        mask = bias[:, None, None].to(query)
        return sdpa(module, query, key, value, mask, *args, **kwargs)

    between(changes, module, tapped)


def hide_positions(changes: Changes, module: nn.Module) -> None:
    """Keep the positions of tokens from the kernel of an attention module.

    transformers hands them to FlashAttention to tell packed sequences. Where tokens were dropped
    it would take the gaps for such, and forget what is in the cache; asking for them reads the
    device in every layer. The module itself may need them (Ministral 3 scales queries by them).

    Args:
        changes: What takes it back.
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
        changes: What takes it out.
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
            held["config"] = own  # where no interrupt can come between

    # The suffix keeps checks such as `"flash" in name` of modules true for the copy.
    name = f"{implementation}_pore{next(_names)}"
    changes.kernel(name, called)
    changes.put(module, "config", with_attention(config, name))


@dataclass(frozen=True)
class LayerAttention:
    """The attention of one decoder layer, of which a reader computes the rows that it needs.

    Attributes:
        layout: Where the visual tokens lie now.
        query: (B, H, L, d) queries of this forward's tokens, as the kernel gets them.
        key: (B, G, m, d) keys, those in the cache first; G divides H.
        mask: The kernel's mask.
        scaling: Factor on the logits.
        softcap: Cap of the logits (Gemma 2), or None.
        past: (B, p) bool, False at padding, of the slots in the cache.
        origin: (B, L) where the tokens were when they entered the decoder.
        memory: What the stage's `prepare` made of the prompt.
        causal: Whether tokens do not look behind, where the mask does not say.
        window: Tokens that a sliding window shows, where the prompt is longer; None without.
        hides: Whether the caller's mask may hide an image from the text.
        read: Rows computed so far, one entry for every reading.
    """

    layout: Layout
    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None
    past: Tensor
    origin: Tensor
    memory: Any = None
    causal: bool = True
    window: int | None = None
    hides: bool = False
    read: list[int] = field(default_factory=list)

    def logits(self, index: Tensor) -> Tensor:
        """Attention logits of some tokens of every image's sample.

        Args:
            index: (I, R) positions of the query tokens in the sequence as it is now.

        Returns:
            (I, H, R, n) logits to the cached and present tokens, at least float32; -inf where the
            query must not look.

        Raises:
            ScoreError: An image is out of the layer's sliding window, or hidden by the mask.
        """
        self.read.append(index.shape[1])
        rows = self.layout.rows
        every = [image.row for image in self.layout.images] == list(range(len(self.query)))
        logits = row_logits(
            self.query,
            self.key,
            rows=None if every else rows,
            index=index,
            valid=torch.cat([self.past, self.layout.tokens], 1),
            mask=self.mask,
            scaling=self.scaling,
            softcap=self.softcap,
            causal=self.causal,
            window=self.window,
        )
        if self.window is not None or self.hides:
            columns, valid = (x.to(logits.device) for x in (self.columns, self.layout.valid))
            seen = (logits[:, 0] != -torch.inf).any(1).gather(1, columns) & valid
            if not bool(seen.any(1).all()):
                image = self.layout.images[int((~seen.any(1)).nonzero()[0])]
                if self.hides:
                    raise ScoreError(
                        f"The attention mask hides image {image.index} of sample {image.row} from "
                        "the tokens whose attention ranks it; let the last token see it, and give "
                        "every prompt a row of the batch."
                    )
                raise ScoreError(
                    f"Image {image.index} of sample {image.row} lies farther back than the "
                    f"{self.window} tokens that the layer whose attention is read looks at; "
                    "choose a pruned layer behind one of full attention, or a shorter prompt."
                )
        return logits

    @property
    def last(self) -> Tensor:
        """(I, 1) position of the last token of every image's sample, which is no padding."""
        return self.layout.last[self.layout.rows, None]

    @property
    def columns(self) -> Tensor:
        """(I, t) where the visual tokens lie among the n slots of `logits`."""
        return self.layout.columns + self.past.shape[1]


Reader = Callable[[LayerAttention], Any]
"""What a stage takes from the attention of a layer.

One whose result a position bias divides has an attribute `normalize` that says in a word what it
measures; a bias that was fitted on something else is refused."""


@dataclass(frozen=True)
class LastToken:
    """Reads text-visual attention A: of the last text token, averaged over heads (PoRe Eq. 1).

    Attributes:
        normalize: "prompt" or "visual", see `text_visual_attention`.
    """

    normalize: Normalize = "prompt"

    def __post_init__(self) -> None:
        check_normalize(self.normalize)

    def __call__(self, attention: LayerAttention) -> Tensor:
        """(I, t) attention of the last token to the visual tokens of every image."""
        logits = attention.logits(attention.last)[:, :, 0]
        valid = attention.layout.valid
        return text_visual_attention(logits, attention.columns, valid, self.normalize)


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
        key: (B, G, m, d) keys, G dividing H; slots behind the cached ones may be empty.
        rows: (I,) the samples to take, in any order and number; None takes each once.
        index: (I, R) which of the q queries to take of each.
        valid: (B, n) bool, False at padding, n <= m.
        mask: The kernel's mask: (B or 1, 1 or H, q, m') bool or additive, or FlexAttention's, which
            then says all; or None or (B, n), and the kernel is causal or sees all.
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
    dtype = torch.promote_types(query.dtype, torch.float32)
    count, taken = index.shape
    picked = query[sample[:, None], :, index].transpose(1, 2).to(dtype)  # (I, H, R, d)
    keys = key[:, :, :n] if rows is None else key[sample, :, :n]
    groups = key.shape[1]
    grouped = picked.reshape(count, groups, heads // groups * taken, width)
    logits = torch.matmul(grouped, keys.to(dtype).transpose(-1, -2)) * scaling
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
        allowed = allowed & (seen if seen.dtype == torch.bool else seen > -1e4)
    else:
        # Queries are the last of the n slots; what comes after the one taken is its future.
        back = (n - length + index)[..., None] - torch.arange(n, device=device)
        back = back if causal else back.abs()
        near = back >= 0 if window is None else (back >= 0) & (back < window)
        allowed = allowed & near[:, None]
    return logits.masked_fill(~allowed, -torch.inf)


def text_visual_attention(
    logits: Tensor, columns: Tensor, valid: Tensor, normalize: Normalize = "prompt"
) -> Tensor:
    """Attention of the last text token to the visual tokens of every image, averaged over heads.

    PoRe Eq. 1. With `normalize="prompt"` each head's softmax runs over the whole prompt, as in the
    released code of FastV and PoRe; with "visual" over the image's visual tokens alone, as Eq. 1 is
    printed. Per head they differ by a factor, so the head mean and its ranking can differ.

    Args:
        logits: (I, H, n) attention logits of the last text token of every image's sample, -inf
            where it does not look.
        columns: (I, t) positions of the image's visual tokens among the n.
        valid: (I, t) bool, False where a smaller image is filled up.
        normalize: "prompt" or "visual".

    Returns:
        (I, t) attention in the dtype of `logits`; 0 where not `valid`.
    """
    columns, valid = columns.to(logits.device), valid.to(logits.device)
    weights = logits.softmax(-1) if normalize == "prompt" else logits
    picked = weights.gather(-1, columns[:, None].expand(-1, logits.shape[1], -1))
    if normalize == "visual":
        picked = picked.masked_fill(~valid[:, None], -torch.inf).softmax(-1)
    return picked.mean(1).masked_fill(~valid, 0.0)


def cls_attention(query: Tensor, key: Tensor, scaling: float, real: Tensor | None = None) -> Tensor:
    """Attention of the CLS token of a vision tower to the patches, per head.

    Args:
        query: (I, H, N + 1, d) queries, CLS first.
        key: (I, H, N + 1, d) keys.
        scaling: Factor on the logits.
        real: (I, N + 1) bool, False at padding; None where there is none.

    Returns:
        (I, H, N) weights after a softmax over CLS and patches, at least float32; the CLS token's
        own column is cut off without renormalising.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = torch.matmul(query[:, :, :1].to(dtype), key.to(dtype).transpose(-1, -2)) * scaling
    if real is not None:
        logits = logits.masked_fill(~real[:, None, None], -torch.inf)
    return logits.softmax(-1)[:, :, 0, 1:]


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
    dtype = torch.promote_types(query.dtype, torch.float32)
    images, _, n, _ = key.shape
    rows = max(_LOGITS // n, 1)
    heads = []
    for q, k in zip(query.unbind(1), key.unbind(1), strict=True):
        means = torch.zeros(images, n, dtype=dtype, device=key.device)
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            logits = torch.matmul(q[:, part].to(dtype), k.to(dtype).mT) * scaling
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
    """Which tokens of a vision tower the mask of its kernel lets be seen.

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
