"""PriorTR: attention of the question, against that of a token that has not seen the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pore.cost.shapes import ModelShape
from pore.engine.readers import LayerAttention, null_row, received, text_rows
from pore.engine.stages import View
from pore.methods._checks import check_choice, check_whole
from pore.methods.pyramiddrop import check_pyramid, pyramid
from pore.methods.staged import StagedPruner

Query = Literal["question", "last"]
Heads = Literal["mean", "max"]

_TINY = 1e-10  # the authors' guard against a division by 0


@dataclass(frozen=True)
class PriorTR(StagedPruner):
    """Keep what the question looks at more than a token before it did (arXiv 2606.24156).

    P is the attention of the question to the visual tokens in the layer before, Q that of the null
    token: the first token after the image, which by the causal mask has seen nothing of the
    question. Both are divided by their sums over the visual tokens; a token scores P ln(P / Q), and
    the highest stay, with their original positions. So the prior that PoRe measures beforehand is
    read here in the prompt itself, and there is no `reweight`: the division has taken the position
    bias away already.

    Each image of a prompt is ranked by itself, by the first text after it. Where the question comes
    before the image, the null token has seen it and is no prior any more. An image with nothing
    between it and the last token is refused.

    The authors also cut the pruned tokens out of the cache of the layers before `layers`, which
    only decoding notices; here these layers cache what they have seen.

    Attributes:
        keep: Tokens per image after the last stage (int), or the fraction of the original number
            (float), truncated as by the authors; the stages before come down to it in equal ratios.
            Or a tuple: what is left of the original number after every stage.
        layers: The 0-based index of the first pruned layer of every stage; attention is that of the
            layer before. The authors take 3, for InternVL 2.
        query: Whose attention P is: the mean over the text from the null token on ("question"), or
            that of the "last" token (the authors' choice for LLaVA-NeXT).
        heads: Whether P and Q are the "mean" over the heads, or the largest ("max").
        with_last: Whether the last token counts as one of the question; it does for the authors'
            LLaVA and InternVL, not for their Qwen-VL.
        offset: Text tokens after the image that are left out before the null token; the authors
            take 1 for InternVL, whose first one only ends the image.
        faithful: Read attention without the causal mask, as the authors' Qwen2-VL code does under
            SDPA: the null token then sees the question, and other tokens stay.
    """

    keep: int | float | tuple[int | float, ...]
    layers: tuple[int, ...] = (3,)
    query: Query = "question"
    heads: Heads = "mean"
    with_last: bool = True
    offset: int = 0
    faithful: bool = False

    name: ClassVar[str] = "PriorTR"
    paper: ClassVar[str] = "arXiv 2606.24156"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pyramid(self.keep, len(self.layers))
        check_choice(Query, query=self.query)
        check_choice(Heads, heads=self.heads)
        check_whole(0, offset=self.offset)

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> PriorTR:
        """One stage before layer 3."""
        return cls(keep, (max(1, min(3, shape.decoder.layers - 1)),))

    def reader(self) -> QuestionAndNull:
        """What P and Q are made of."""
        return QuestionAndNull(
            self.query, self.heads, self.with_last, self.offset, causal=not self.faithful
        )

    def remaining(self, visual: int) -> Sequence[int]:
        """Tokens that are left after every stage, of an image that came with so many."""
        return pyramid(self.keep, len(self.layers), visual)

    def must_meet(self, stage: int) -> bool:
        """Numbers that were given one by one are all to be met."""
        return isinstance(self.keep, tuple) or super().must_meet(stage)

    def score(self, stage: int, view: View) -> Tensor:
        """P ln(P / Q)."""
        question, null = view.attention.unbind(1)
        return gained(question, null)


@dataclass(frozen=True)
class QuestionAndNull:
    """Reads what every visual token gets from the question, and from the token before it.

    Attributes:
        query: As in `PriorTR`, and so the other fields.
        heads: See there.
        with_last: See there.
        offset: See there.
        causal: Whether tokens see only those before them.
    """

    query: Query
    heads: Heads
    with_last: bool
    offset: int
    causal: bool

    def __call__(self, attention: LayerAttention) -> Tensor:
        """(I, 2, t) attention, at least float32; the null token's comes second."""
        if not self.causal:
            attention = replace(attention, mask=None, causal=False)
        layout, last = attention.layout, attention.last
        null = null_row(layout, self.offset)
        if self.query == "last":
            index, valid = last, torch.ones_like(last, dtype=torch.bool)
        else:
            index, valid = text_rows(layout)
            valid = valid if self.with_last else valid & (index != last)
        one = torch.ones_like(null, dtype=torch.bool)
        both = [(index, valid), (null, one)]
        found = torch.stack([received(attention, *rows, "each") for rows in both], 1)
        return found.mean(2) if self.heads == "mean" else found.amax(2)


def gained(question: Tensor, null: Tensor) -> Tensor:
    """What every visual token has of the question that it had not before.

    Args:
        question: (I, t) attention of the question, 0 at what is no token.
        null: (I, t) attention of the null token.

    Returns:
        (I, t) P ln(P / Q), where P and Q are the two as shares of their sums. Summed up it is how
        far the question moves attention (the Kullback-Leibler divergence).
    """
    p, q = (x / (x.sum(-1, keepdim=True) + _TINY) for x in (question, null))
    return p * ((p + _TINY) / (q + _TINY)).log()
