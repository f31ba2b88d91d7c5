"""Readers: what a stage takes from the attention of one decoder layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pore.errors import InputError, ScoreError
from pore.layout import Layout
from pore.tensors.attention import Normalize, check_normalize, row_logits, visual_weights
from pore.tensors.gathering import pack

_CHUNK = 1 << 23
"""Attention weights computed at a time, over all images and heads, to bound memory."""


@dataclass(frozen=True)
class HeadMax:
    """Reads what every visual token gets, in the head that gives it most.

    The largest weight over the heads, for every pair of tokens, is averaged over the visual tokens
    of the image that look, and over the text tokens after the image.
    """

    measures: ClassVar[str] = "visual times text, largest head"

    def __call__(self, attention: LayerAttention) -> Tensor:
        """(I, 2, t) what every token gets from visual tokens and from text, at least float32."""
        layout = attention.layout
        return torch.stack(
            [
                received(attention, layout.columns, layout.valid, "max", corrected=False),
                received(attention, *text_rows(layout), "max"),
            ],
            1,
        )


def text_rows(layout: Layout) -> tuple[Tensor, Tensor]:
    """The text tokens after every image.

    Args:
        layout: Where things lie.

    Returns:
        index (I, R), their positions in the sequence, ascending; and valid (I, R) bool, False where
        an image has fewer.
    """
    return pack(layout.text_after)


def null_row(layout: Layout, offset: int = 0) -> Tensor:
    """The text token after every image that sees the image, but not a question that follows it.

    In the prompt ``[5, IMG, IMG, 6, 7, 8]`` it is the 6 at position 3: under a causal mask what it
    looks at does not depend on 7 and 8.

    Args:
        layout: Where things lie.
        offset: How many text tokens after the image are left out before it.

    Returns:
        (I, 1) positions in the sequence.

    Raises:
        InputError: An image has no such token before the last one of its prompt.
    """
    index, valid = text_rows(layout)
    enough = valid.sum(1) > offset + 1  # the last of them is the last of the prompt
    if not bool(enough.all()):
        image = layout.images[int((~enough).nonzero()[0])]
        raise InputError(
            f"Image {image.index} of sample {image.row} is followed by fewer than {offset + 2} "
            "tokens of text, so none of them tells how the image is looked at before the question "
            "is read; put the question after the image."
        )
    return index[:, offset, None]


def received(
    attention: LayerAttention,
    index: Tensor,
    valid: Tensor,
    heads: Literal["max", "mean", "each"],
    corrected: bool = True,
) -> Tensor:
    """Attention on every visual token, over the heads and then averaged over some query tokens.

    Args:
        attention: The layer's.
        index: (I, R) positions of the query tokens.
        valid: (I, R) bool, False where an image has fewer.
        heads: Whether the largest weight over the heads counts, for each pair of tokens, or the
            mean, or each head by itself.
        corrected: As in `LayerAttention.weights`.

    Returns:
        (I, t) attention, at least float32, or of each head (I, H, t); 0 at what is no token of the
        image.
    """
    layout = attention.layout
    images, count = len(index), attention.query.shape[1]
    slots = attention.past.shape[1] + attention.query.shape[2]
    rows = max(1, _CHUNK // (images * count * slots))
    total: Tensor | None = None
    for first in range(0, index.shape[1], rows):
        some, there = index[:, first : first + rows], valid[:, first : first + rows]
        picked = attention.weights(some, corrected=corrected)
        if heads != "each":
            picked = picked.amax(1, True) if heads == "max" else picked.mean(1, True)
        part = picked.masked_fill(~there[:, None, :, None], 0.0).sum(2)
        total = part if total is None else total + part
    assert total is not None
    total = total / valid.sum(-1)[:, None, None]
    total = total.masked_fill(~layout.valid[:, None], 0.0)
    return total if heads == "each" else total[:, 0]


def _product(attention: Tensor) -> Tensor:
    """What `HeadMax` reads, as tokens are ranked by it: the product of its two parts."""
    return attention.prod(1)


@dataclass(frozen=True)
class LayerAttention:
    """The attention of one decoder layer, of which a reader computes the rows that it needs.

    Attributes:
        layout: Where the visual tokens lie now.
        query: (B, H, L, d) queries of this call's tokens, as the kernel gets them.
        key: (B, G, p + L, d) keys, those in the cache first; G divides H.
        mask: The kernel's mask: 4-D, 2-D of padding alone, or None.
        scaling: Factor on the logits.
        softcap: Cap of the logits (Gemma 2), or None.
        past: (B, p) bool, False at padding, of the slots in the cache.
        origin: (B, L) which of the tokens that entered the first layer each one is.
        memory: What the stage's `prepare` made of the prompt.
        causal: Whether tokens look only at those before them; used where `mask` is None or only
            tells padding.
        window: Tokens that a sliding window shows, where the prompt is longer; None without.
        hides: Whether the caller's mask may hide an image from the text.
        plain: Computes query (B, H, L, d) and key (B, G, L, d) of this call's tokens without RoPE;
            None where RoPE has not turned them.
        value: (B, G, p + L, e) values, those in the cache first; of a layer that is read ahead,
            those of this call alone.
        read: Rows computed so far, one entry for every reading.
        as_ranked: The attention that text is ranked by, where a correction has it otherwise, such
            as without RoPE; None where that is this one.
        each_head: What a correction makes of (I, H, R, t) weights before heads are averaged.
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
    plain: Callable[[], tuple[Tensor, Tensor]] | None = None
    value: Tensor | None = None
    read: list[int] = field(default_factory=list)
    as_ranked: LayerAttention | None = None
    each_head: Callable[[Tensor], Tensor] | None = None

    def weights(
        self, index: Tensor, *, normalize: Normalize = "prompt", corrected: bool = True
    ) -> Tensor:
        """What some tokens of every image's sample pay its visual tokens, in every head.

        Args:
            index: (I, R) positions of the tokens that look, in the sequence as it is now.
            normalize: What a head's softmax runs over: the whole "prompt", or the "visual" tokens
                of the image.
            corrected: Whether a correction of single heads, or of how the layer looks at all, may
                change them. It is for text that looks at the image, and for nothing else.

        Returns:
            (I, H, R, t) weights, at least float32; 0 where there is no visual token.

        Raises:
            ScoreError: As in `logits`.
        """
        source = self.as_ranked if corrected and self.as_ranked is not None else self
        weights = visual_weights(source.logits(index), self.columns, self.layout.valid, normalize)
        return self.each_head(weights) if corrected and self.each_head is not None else weights

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
                    "choose a pruned layer after one of full attention, or a shorter prompt."
                )
        return logits

    @property
    def without_rope(self) -> LayerAttention:
        """The same attention as it were if RoPE turned neither queries nor keys.

        Keys in the cache are turned already, so that the logits to them are -inf: queries look at
        the tokens of this call alone. The layer's projections run once more for it.
        """
        if self.plain is None:
            return self
        query, key = self.plain()
        cached = key.new_zeros(*key.shape[:2], self.past.shape[1], key.shape[3])
        nothing = torch.zeros_like(self.past)
        key = torch.cat([cached, key], 2)
        return replace(self, query=query, key=key, past=nothing, plain=None)

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

One whose result a position bias divides says in a word what it `measures`, such as "prompt"; a
bias that was fitted to something else is refused (files keep the word as `normalize`)."""


@dataclass(frozen=True)
class LastToken:
    """Reads text-visual attention A: of the last text token, averaged over heads (PoRe Eq. 1).

    Attributes:
        normalize: "prompt" or "visual", see `visual_weights`.
    """

    normalize: Normalize = "prompt"

    def __post_init__(self) -> None:
        check_normalize(self.normalize)

    @property
    def measures(self) -> str:
        """The word for it in a profile."""
        return self.normalize

    def __call__(self, attention: LayerAttention) -> Tensor:
        """(I, t) attention of the last token to the visual tokens of every image."""
        return attention.weights(attention.last, normalize=self.normalize)[:, :, 0].mean(1)


@dataclass(frozen=True)
class NullToken:
    """Reads the attention of the token after the image, which sees nothing of the question.

    It is a prior of the very prompt: where tokens look whatever they are asked (PriorTR).

    Attributes:
        normalize: "prompt" or "visual", see `visual_weights`.
        offset: See `null_row`.
    """

    normalize: Normalize = "prompt"
    offset: int = 0

    def __post_init__(self) -> None:
        check_normalize(self.normalize)

    def __call__(self, attention: LayerAttention) -> Tensor:
        """(I, t) attention of that token to the visual tokens of every image."""
        index = null_row(attention.layout, self.offset)
        return attention.weights(index, normalize=self.normalize)[:, :, 0].mean(1)
