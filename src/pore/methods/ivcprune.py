"""IVC-Prune: tokens at special positions, and tokens whose values resemble the question's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pore.cost.shapes import ModelShape
from pore.engine.limits import check_layer
from pore.engine.pruner import Pruner
from pore.engine.readers import LayerAttention, text_rows
from pore.engine.stages import Selection, Stage, View
from pore.errors import BudgetError
from pore.families.base import Family
from pore.methods._checks import check_share, check_whole
from pore.tensors.attention import Normalize, check_normalize
from pore.tensors.gathering import pack, widened
from pore.tensors.selection import budget, check_keep, check_scores, top_k

_CHUNK = 1 << 23
"""How many weights are computed at a time, over all images and heads, to bound memory."""


@dataclass(frozen=True)
class IVCPrune(Pruner):
    """Keep tokens at positions that RoPE singles out, and those the question is about
    (arXiv 2602.03060).

    Before layer K three groups are found among an image's N tokens. No attention is read.

    Coordinates: RoPE rotates a token's query and key by angles that depend on its position. The
    tokens with the largest mean cosine of these angles are hardly rotated, those with the largest
    mean sine by about 90 degrees. They stay whatever they show ("implicit visual coordinates").

    Seeds: the values in layer K - 1, which RoPE does not touch, are compared with each other. Every
    text token after the image spreads a softmax over its scaled dot products with them, averaged
    over the key-value heads; later tokens are included. The tokens that get most are seeds.

    Foreground: seeds and text tokens do the same once more, each with one vote, and the tokens to
    which they give most are the foreground.

    With `keep` exactly that many tokens stay: coordinates and seeds, then the best of the
    foreground's ranking. This is what the authors do for Qwen2.5-VL, and `IVCPrune(keep=0.5)` is
    their setting. If the first two groups alone are more than `keep`, the best of them by that
    ranking stay; the authors keep them all.

    With `foreground` instead of `keep`, that many of the ranking stay, and all coordinates and
    seeds with them. The groups overlap, so how many tokens stay depends on the prompt. This is what
    the authors do for LLaVA: `IVCPrune(foreground=0.2, coordinates=0.25, normalize="prompt")` keeps
    20 to 31 %.

    Tokens keep their positions. After the prefill the authors also shorten the caches of the layers
    before K to the kept tokens (all layers for Qwen, all but layer 0 for LLaVA). Here these layers
    keep their whole cache, so that decoding sees more; the prefill is the same.

    On several axes (Qwen-VL) the means are over the axes too. There the patches in row r, column c
    and in row c, column r score the same, and the earlier wins. The first `skip` text tokens after
    an image have no vote. If there are no others, the last one votes (the authors' code divides by
    zero). Of several images, each uses the text that follows it, while the authors use only the
    first image.

    If left padding is counted, the coordinates change. `generate` does not count it; a plain
    forward does, unless it is given `position_ids`.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float). Give this or `foreground`.
        foreground: Tokens that stay for their values alone (int), or their fraction (float).
        layer: K, the 0-based index of the first pruned layer.
        coordinates: Number of coordinates by cosine, and the same number by sine, as a share of
            `keep` or of `foreground`.
        seeds: Number of seeds as a share of the image's tokens; at least one.
        normalize: What the softmax runs over: "visual", the image (the authors for Qwen2.5-VL), or
            "prompt", all tokens (for LLaVA).
        skip: Text tokens right after the image that have no vote, such as the tag that ends it.
    """

    keep: int | float | None = None
    foreground: int | float | None = None
    layer: int = 16
    coordinates: float = 0.2
    seeds: float = 0.01
    normalize: Normalize = "visual"
    skip: int = 2

    name: ClassVar[str] = "IVC-Prune"
    paper: ClassVar[str] = "arXiv 2602.03060"
    reads_positions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.foreground is None):
            raise BudgetError(
                "IVC-Prune takes either `keep`, for an exact number, or `foreground`, to which "
                "coordinates and seeds are added."
            )
        check_keep(self._share)
        check_share(coordinates=self.coordinates)
        if not 0 <= self.seeds <= 1:
            raise BudgetError(f"seeds={self.seeds!r} is not a share of the tokens, from 0 to 1.")
        check_normalize(self.normalize)
        check_whole(0, skip=self.skip)

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> IVCPrune:
        """In the middle of the decoder, like the authors' 16 of LLaVA-1.5-7B's 32 layers."""
        return cls(keep, layer=max(1, round(shape.decoder.layers / 2)))

    def stages(self) -> Sequence[Stage]:
        """One stage, before layer K."""
        return [Stage(self.layer, self._select, self._read)]

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse a layer that the decoder lacks."""
        check_layer(self.layer, family, model)

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image that enter every decoder layer."""
        if self.keep is None:
            raise BudgetError(
                "How many tokens `foreground` leaves depends on the prompt; give `keep` for a "
                "number that is known in advance."
            )
        kept = budget(self.keep, visual)
        return [visual] * self.layer + [kept] * (layers - self.layer)

    @property
    def _share(self) -> int | float:
        """The number or fraction that coordinates are a share of."""
        share = self.foreground if self.keep is None else self.keep
        assert share is not None
        return share

    def _coordinates(self, visual: int) -> int:
        """Number of coordinates of each kind, for an image that came with `visual` tokens."""
        share = self.coordinates * self._share
        return round(share if isinstance(self._share, int) else share * visual)

    def _read(self, attention: LayerAttention) -> Votes:
        """How much seeds and text give to every token."""
        assert attention.value is not None
        layout, start = attention.layout, attention.past.shape[1]
        index, valid = voters(*text_rows(layout), self.skip)
        weights = partial(
            value_weights,
            attention.value,
            torch.cat([attention.past, layout.tokens], 1),
            layout.rows,
            attention.columns,
            layout.valid if self.normalize == "visual" else None,
        )
        counts = [max(1, round(self.seeds * len(image.columns))) for image in layout.images]
        attention.read.append(index.shape[1] + max(counts))
        return vote(weights, index + start, valid, attention.columns, layout.valid, counts)

    def _select(self, view: View) -> Selection:
        valid, votes = view.layout.valid, view.attention
        assert isinstance(votes, Votes)
        assert view.positions is not None
        assert view.rotary is not None
        there = valid.sum(-1)
        places = torch.stack([view.layout.gather(axis) for axis in view.positions])
        cosines, sines = turns(view.rotary, view.hidden_states, places)
        counts = [self._coordinates(len(image.columns)) for image in view.layout.images]
        some = torch.minimum(torch.tensor(counts, device=there.device), there)
        always = votes.seeds | top_k(cosines, some, valid) | top_k(sines, some, valid)
        if self.keep is None:
            assert self.foreground is not None
            return Selection(always | top_k(votes.scores, view.budget(self.foreground), valid))
        kept = torch.tensor(view.budget(self.keep), device=there.device)
        check_scores(votes.scores, kept, valid)
        # Weights are between 0 and 1, so 2 puts a token before all others.
        return Selection(top_k(votes.scores + 2 * always, kept, valid))


@dataclass(frozen=True)
class Votes:
    """The result of comparing values.

    Attributes:
        seeds: (I, t) bool, the tokens to which the text gives most.
        first: (I, t) the mean weight that every token gets from the text.
        scores: (I, t) the mean weight that it gets from seeds and text.
    """

    seeds: Tensor
    first: Tensor
    scores: Tensor


def voters(index: Tensor, valid: Tensor, skip: int) -> tuple[Tensor, Tensor]:
    """The text tokens that vote: all but the first ones, or the last one if there are no others.

    Args:
        index: (I, R) positions of the text tokens after every image, ascending.
        valid: (I, R) bool, False where an image has fewer.
        skip: How many of the first do not vote.

    Returns:
        index (I, R') and valid (I, R') of those that vote.
    """
    place = valid.cumsum(-1) - 1
    last = valid.sum(-1, keepdim=True) - 1
    places, valid = pack(valid & (place >= last.clamp(max=skip)))
    return index.gather(1, places), valid


def value_weights(
    value: Tensor,
    tokens: Tensor,
    rows: Tensor,
    columns: Tensor,
    visual: Tensor | None,
    index: Tensor,
) -> Tensor:
    """Each token's softmax over values, by their similarity to its own, averaged over the heads.

    Every token is compared with every other, later ones too.

    Args:
        value: (B, G, n, e) values of all tokens; slots after the cached ones may be empty.
        tokens: (B, n') bool, False at padding, n' at most n.
        rows: (I,) the sample of every image.
        columns: (I, t) where its visual tokens are.
        visual: (I, t) bool: the softmax runs over these; None: over all tokens of the sample.
        index: (I, R) the tokens whose weights are wanted.

    Returns:
        (I, R, t) weights on the visual tokens, at least float32.
    """
    device, slots = value.device, tokens.shape[1]
    rows, columns, index = rows.to(device), columns.to(device), index.to(device)
    if visual is None:
        seen = tokens.to(device)[rows]
    else:
        seen = torch.zeros(len(rows), slots, dtype=torch.bool, device=device)
        seen = seen.scatter(1, columns, visual.to(device))
    states = widened(value[rows, :, :slots])
    heads, size = states.shape[1], states.shape[3]
    at_once = max(1, _CHUNK // (max(len(rows), 1) * heads * slots))
    parts = []
    for first in range(0, index.shape[1], at_once):
        some = index[:, first : first + at_once]
        look = states.gather(2, some[:, None, :, None].expand(-1, heads, -1, size))
        logits = (look @ states.mT / math.sqrt(size)).masked_fill(~seen[:, None, None], -torch.inf)
        weights = logits.softmax(-1).mean(1)
        parts.append(weights.gather(2, columns[:, None].expand(-1, some.shape[1], -1)))
    return torch.cat(parts, 1)


def vote(
    weights: Callable[[Tensor], Tensor],
    index: Tensor,
    valid: Tensor,
    columns: Tensor,
    visual: Tensor,
    counts: Sequence[int],
) -> Votes:
    """Let the text choose seeds, and seeds and text vote together.

    Args:
        weights: Returns the weights (I, R, t) that tokens (I, R) give to the visual ones.
        index: (I, R) positions of the text tokens that have a vote.
        valid: (I, R) bool, False where an image has fewer.
        columns: (I, t) positions of the visual tokens.
        visual: (I, t) bool, False where a smaller image is filled up.
        counts: Number of seeds of every image; all of its tokens if it has fewer.

    Returns:
        The seeds, and both averages.
    """
    given, voices = _sum(weights(index), valid)
    first = given / voices
    some = torch.minimum(torch.tensor(counts, device=visual.device), visual.sum(-1))
    seeds = top_k(first, some, visual)
    places, there = pack(seeds)
    more, further = _sum(weights(columns.gather(1, places)), there)
    return Votes(seeds, first, (given + more) / (voices + further))


def _sum(weights: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """(I, t) the sum of the valid weights, and (I, 1) how many there are."""
    valid = valid.to(weights.device)
    return weights.masked_fill(~valid[..., None], 0.0).sum(1), valid.sum(-1, keepdim=True)


def turns(
    rotary: Callable[[Tensor, Tensor], Any], states: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """How far RoPE rotates tokens: the mean cosine and sine of their angles.

    Args:
        rotary: Makes rotary tables for states (B, m, D) at positions (B, m).
        states: States; only their type and device matter.
        positions: (A, I, t) positions of the tokens on A axes.

    Returns:
        Cosines and sines (I, t), over the rotary channels and the axes, at least float32.
    """
    # Sorted, so that the same positions in another order of axes have exactly the same sum.
    ordered = positions.sort(0).values
    means = []
    for axis in ordered:
        tables = rotary(widened(states[:1, :1]).expand(len(axis), axis.shape[1], -1), axis)
        alone = isinstance(tables, Tensor)  # a complex number for every two channels (Llama 4)
        cosines, sines = (tables.real, tables.imag) if alone else tables
        # Text has one position on all axes; some tables still have an axis for each.
        cosines, sines = (x[0] if x.dim() == 4 else x for x in (cosines, sines))
        means.append(torch.stack([cosines.mean(-1), sines.mean(-1)]))
    cosine, sine = torch.stack(means).mean(0)
    return cosine, sine
