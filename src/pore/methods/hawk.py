"""HAWK: similarity of question and visual tokens before the decoder, in the heads that matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pore.cost.shapes import ModelShape
from pore.engine.limits import check_query
from pore.engine.readers import LayerAttention
from pore.engine.stages import Selection, Stage, View
from pore.errors import ScoreError
from pore.layout import Layout
from pore.methods._checks import check_choice
from pore.methods.scorer import BudgetPruner
from pore.tensors.gathering import pack, take, widened
from pore.tensors.selection import budget, top_k

QWEN25_VL_7B = (
    0.0875, 0.3000, 0.0480, 0.0321, 0.0104, 0.0102, 0.0336, 0.0460, 0.0540, 0.0472,
    0.0234, 0.0537, 0.0109, 0.0573, 0.0276, 0.0403, 0.0429, 0.0352, 0.0162, 0.0519,
    0.0553, 0.0266, 0.0222, 0.0480, 0.0337, 0.0250, 0.0000, 0.0224,
)  # fmt: skip
"""What each head of Qwen2.5-VL-7B is worth, as the authors measured and published it."""

Normalization = Literal["l2", "softmax", "minmax"]

_TINY = 1e-12


@dataclass(frozen=True)
class HAWK(BudgetPruner):
    """Keep the visual tokens most like the question, in the heads that matter (arXiv 2604.07812).

    Before the decoder, with the norm and the projections of layer 0: every head compares the
    queries of the question with the keys of the visual tokens, both without RoPE and without a
    softmax, averaged over the question. Each head's result is scaled to length 1 over the visual
    tokens of an image, and a token's score is the weighted sum over heads. The highest stay;
    positions stay, and every layer sees the shorter prompt. There is no `reweight`: scores are
    signed, and without RoPE they have no position bias.

    The question is the text after the last image of the prompt, for all of its images. `between`
    says which part of it counts, as for the authors in Qwen2.5-VL.

    The authors have one budget for all images and videos of a prompt; here each image has its own.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float), rounded up as by the
            authors, who use 0.198 to 0.2.
        weights: What each head of layer 0 is worth. The default is what the authors measured for
            Qwen2.5-VL-7B, by leaving out one head at a time; it means nothing for another model.
            None counts all heads alike, which works everywhere but is not the published method.
        normalize: How every head's result is brought to a common scale: by its length ("l2"), or
            by a "softmax" or a linear map to 0 to 1 ("minmax") over the visual tokens.
        between: Two token ids. The question begins after the last token with the first id and ends
            before the last token with the second id, or at the end of the prompt if there is none.
            Without the first id, or in a prompt that is given as embeddings, all text after the
            last image counts. The default is Qwen's <|vision_end|> and <|im_end|>; None counts all
            text.
    """

    keep: int | float
    weights: tuple[float, ...] | None = QWEN25_VL_7B
    normalize: Normalization = "l2"
    between: tuple[int, int] | None = (151653, 151645)

    name: ClassVar[str] = "HAWK"
    paper: ClassVar[str] = "arXiv 2604.07812"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(Normalization, normalize=self.normalize)
        for name in ("weights", "between"):
            value = getattr(self, name)
            if isinstance(value, list):  # as JSON has it
                object.__setattr__(self, name, tuple(value))
        if self.weights is not None and not all(map(math.isfinite, self.weights)):
            raise ScoreError(f"weights={self.weights!r} are not all finite numbers.")

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> HAWK:
        """All heads alike, and all text; the published settings for Qwen2.5-VL-7B's sizes."""
        decoder, tower = shape.decoder, shape.tower
        windows = tower is not None and tower.window is not None  # its sister Qwen2-VL has none
        if windows and (decoder.hidden, decoder.heads) == (3584, len(QWEN25_VL_7B)):
            return cls(keep)
        return cls(keep, weights=None, between=None)

    def kept(self, visual: int) -> int:
        """How many tokens stay of an image that came with `visual` tokens."""
        if isinstance(self.keep, float):
            return min(visual, math.ceil(visual * self.keep))
        return budget(self.keep, visual)

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image that enter every decoder layer."""
        return [self.kept(visual)] * layers

    def stages(self) -> Sequence[Stage]:
        """One stage, on the embeddings; positions stay."""
        return [
            Stage(
                0,
                self._select,
                self._read,
                ahead=True,
                prepare=self._question,
                positions="original",
            )
        ]

    def _question(self, view: View) -> tuple[Tensor, Tensor]:
        """(I, R) where the question of every image is, and bool, False at filling."""
        check_query(view.layout)
        return pack(question_rows(view.layout, view.input_ids, self.between))

    def _read(self, attention: LayerAttention) -> Tensor:
        heads = attention.query.shape[1]
        if self.weights is not None and len(self.weights) != heads:
            raise ScoreError(
                f"HAWK has weights for {len(self.weights)} heads, but layer 0 of this model has "
                f"{heads}. The published ones are for Qwen2.5-VL-7B; give `weights` measured for "
                "this model, or weights=None, which counts all heads alike."
            )
        attention.read.append(1)
        values = likeness(attention, *attention.memory)
        return weighted(values, attention.layout.valid, self.normalize, self.weights)

    def _select(self, view: View) -> Selection:
        scores: Tensor = view.attention
        return Selection(top_k(scores, view.budget(self.kept), view.layout.valid))


def question_rows(
    layout: Layout, input_ids: Tensor | None, between: tuple[int, int] | None
) -> Tensor:
    """Where the question of every image is.

    Args:
        layout: Where tokens lie.
        input_ids: (B, L) token ids, or None.
        between: As in `HAWK`.

    Returns:
        (I, L) bool, with at least one True in every row.
    """
    rows, last = layout.rows, layout.columns.masked_fill(~layout.valid, -1).amax(1)
    # After the last image of the sample.
    end = last.new_full((len(layout.tokens),), -1).scatter_reduce(0, rows, last, "amax")
    slots = torch.arange(layout.text.shape[1], device=rows.device)
    after = layout.text & (slots > end[:, None])
    if input_ids is None or between is None:
        return after[rows]
    first, second = (_last(input_ids.to(rows.device) == one, layout.tokens) for one in between)
    second = torch.where(second > first, second, slots.shape[0])
    inside = layout.tokens & (slots > first[:, None]) & (slots < second[:, None])
    inside |= ~inside.any(1, keepdim=True) & (slots == first[:, None])
    return torch.where(first[:, None] >= 0, inside, after)[rows]


def _last(marked: Tensor, tokens: Tensor) -> Tensor:
    """(B,) the last of the tokens that are marked; -1 if none is."""
    slots = torch.arange(marked.shape[1], device=marked.device)
    return torch.where(marked & tokens, slots, -1).amax(1)


def likeness(attention: LayerAttention, index: Tensor, valid: Tensor) -> Tensor:
    """How similar queries of some tokens and keys of the visual tokens are, signed.

    Args:
        attention: The attention of the layer.
        index: (I, R) positions of the tokens whose queries count.
        valid: (I, R) bool, False at filling.

    Returns:
        (I, H, t) the mean over the tokens of their logits to every visual token, at least float32.
    """
    layout = attention.layout
    query = take(widened(attention.query)[layout.rows].transpose(1, 2), index, 1)
    weights = (valid / valid.sum(1, keepdim=True)).to(query)
    mean = torch.einsum("ir,irhd->ihd", weights, query)  # first, as logits are linear in it
    key = take(widened(attention.key)[layout.rows].transpose(1, 2), attention.columns, 1)
    mean = mean.view(len(mean), key.shape[2], -1, mean.shape[-1])
    return torch.einsum("igjd,itgd->igjt", mean, key).flatten(1, 2) * attention.scaling


def normalized(values: Tensor, valid: Tensor, how: Normalization) -> Tensor:
    """Bring the values of every head to a common scale over the visual tokens.

    Args:
        values: (I, H, t) signed.
        valid: (I, t) bool.
        how: As in `HAWK`.

    Returns:
        (I, H, t); arbitrary where not `valid`.
    """
    there = valid[:, None]
    if how == "softmax":
        return values.masked_fill(~there, -torch.inf).softmax(-1)
    if how == "l2":
        length = values.masked_fill(~there, 0.0).norm(dim=-1, keepdim=True)
        sized: Tensor = values / length.clamp(min=_TINY)
        return sized
    low = values.masked_fill(~there, torch.inf).amin(-1, keepdim=True)
    high = values.masked_fill(~there, -torch.inf).amax(-1, keepdim=True)
    return (values - low) / (high - low).clamp(min=_TINY)


def weighted(
    values: Tensor, valid: Tensor, how: Normalization, weights: Sequence[float] | None
) -> Tensor:
    """The weighted sum over heads, each brought to a common scale.

    Args:
        values: (I, H, t) signed.
        valid: (I, t) bool.
        how: As in `HAWK`.
        weights: One for each of the H heads; None for all alike.

    Returns:
        (I, t) scores; 0 where not `valid`.
    """
    sized = normalized(values, valid, how)
    each = sized.new_tensor([1.0] * sized.shape[1] if weights is None else weights)
    return torch.einsum("iht,h->it", sized, each).masked_fill(~valid, 0.0)
