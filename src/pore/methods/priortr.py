"""PriorTR: the question's attention, compared with that of a token that cannot see the question."""

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
    """Keep what the question looks at more than a token before it does (arXiv 2606.24156).

    P is the attention of the question to the visual tokens in the layer before, Q that of the null
    token: the first token after the image, which because of the causal mask has not seen the
    question. Both are divided by their sums over the visual tokens; a token's score is P ln(P / Q),
    and the highest stay, with their original positions. So the prior that PoRe measures beforehand
    is read here from the prompt itself, and there is no `reweight`: the division has already
    removed the position bias.

    Each image of a prompt is ranked by itself, by the first text after it. If the question comes
    before the image, the null token has seen it and is not a prior any more. An image with nothing
    between it and the last token is refused.

    The authors also remove the pruned tokens from the caches of the layers before `layers`, which
    affects only decoding; here these layers cache what they have seen.

    Attributes:
        keep: Tokens per image after the last stage (int), or the fraction of the original number
            (float), truncated as by the authors; the stages before go down to it in equal ratios.
            Or a tuple: what is left of the original number after every stage.
        layers: The 0-based index of the first pruned layer of every stage; attention is read in the
            layer before. The authors take 3, and 2 for InternVL.
        query: Whose attention P is: the mean over the text from the null token on ("question"), or
            that of the "last" token (the authors' choice for LLaVA-NeXT).
        heads: Whether P and Q are the "mean" over the heads, or the largest ("max").
        with_last: Whether the last token counts as part of the question; it does in the authors'
            LLaVA and InternVL, not in their Qwen-VL.
        offset: Number of text tokens between the image and the null token; the authors take 1 for
            InternVL, whose first text token only ends the image.
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
        """Reads the attention that P and Q are made from."""
        return QuestionAndNull(
            self.query, self.heads, self.with_last, self.offset, causal=not self.faithful
        )

    def remaining(self, visual: int) -> Sequence[int]:
        """Tokens left after every stage, for an image that came with `visual` tokens."""
        return pyramid(self.keep, len(self.layers), visual)

    def must_meet(self, stage: int) -> bool:
        """Numbers that are given for every stage must all be met."""
        return isinstance(self.keep, tuple) or super().must_meet(stage)

    def score(self, stage: int, view: View) -> Tensor:
        """P ln(P / Q)."""
        question, null = view.attention.unbind(1)
        return gained(question, null)


@dataclass(frozen=True)
class QuestionAndNull:
    """Reads what every visual token gets from the question, and from the token before it.

    Attributes:
        query: As in `PriorTR`.
        heads: As in `PriorTR`.
        with_last: As in `PriorTR`.
        offset: As in `PriorTR`.
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
    """How much more attention every visual token gets from the question than without it.

    Args:
        question: (I, t) attention of the question, 0 at filling.
        null: (I, t) attention of the null token.

    Returns:
        (I, t) P ln(P / Q), where P and Q are the two as shares of their sums. The sum over tokens
        is the Kullback-Leibler divergence: how far the question moves attention.
    """
    p, q = (x / (x.sum(-1, keepdim=True) + _TINY) for x in (question, null))
    return p * ((p + _TINY) / (q + _TINY)).log()
