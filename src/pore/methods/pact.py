"""PACT: drop unimportant visual tokens, and merge the others around the densest of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pore.cost.shapes import ModelShape
from pore.engine.limits import check_layer
from pore.engine.pruner import Pruner
from pore.engine.readers import LayerAttention
from pore.engine.stages import Merges, Selection, Stage, View
from pore.errors import BudgetError
from pore.families.base import Family
from pore.layout import Layout
from pore.tensors.gathering import cosine, inverse, widened
from pore.tensors.selection import by_score, check_finite, check_keep, top_k

_STEPS = 24
"""Halvings in the search for a cutoff: distances, which are 2 at most, are then told apart as well
as float32 does."""


@dataclass(frozen=True)
class PACT(Pruner):
    """Drop what few look at, and merge the rest into its densest tokens (arXiv 2504.08966).

    Before layer K, from what this layer's attention gets:

    1. *Importance.* Queries without RoPE are averaged over the prompt up to the last visual token;
       a token's importance is what this mean query pays its key without RoPE, of everything up to
       there, averaged over heads, times the length of the token's state. The `share` with the most
       goes on.
    2. *Clusters.* Distance is 1 minus the cosine of keys after RoPE, of all key heads together, and
       density the sum of exp(-(d / 2)²) over those that go on. From the densest down, a token
       becomes a centre unless a centre lies within the cutoff.
    3. *Merging.* Every token, also one that was found unimportant, goes to its nearest centre if
       that lies within `reach` times the cutoff; others are dropped. A centre stays where it is,
       with the mean state of its tokens. From K on attention counts it as many times as it has
       tokens (the logarithm is added to the logits), in the prefill and while decoding. In
       recurrent layers, which have no attention, it counts once.

    With `keep` exactly that many tokens stay: the cutoff is found by bisection on the number of
    centres, and where no cutoff gives it, the densest of the other tokens become centres too. If
    `keep` is more than the `share`, as many go on. With `cutoff` the number follows from the
    tokens, as in the authors' code; theirs for LLaVA-OneVision is 0.21, for Qwen2-VL 0.1 with a
    share of 0.8. Time and memory for the distances grow with the square of the tokens that go on.

    It has no `reweight`: what ranks is no attention of a text token, and RoPE is left out of it on
    purpose. The authors' code ignores the padding mask, and takes one prompt at a time.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
        layer: K, the 0-based index of the first layer that sees fewer tokens.
        share: The fraction of the tokens that go on to be clustered, rounded down.
        cutoff: Instead of `keep`, the distance within which a token is merged into a denser one.
        reach: How many times as far as the cutoff a token may lie from its centre. None: tokens
            that go on all join their nearest centre, and the others are dropped.
        proportional: Whether attention counts a token by its size. FlashAttention and
            FlexAttention cannot, and are refused.
        faithful: With `cutoff`, take all images of a sample as one set of tokens, and the logarithm
            of the sizes in half precision, as the authors' code does.
    """

    keep: int | float | None = None
    layer: int = 4
    share: float = 0.55
    cutoff: float | None = None
    reach: float | None = 1.5
    proportional: bool = True
    faithful: bool = False

    name: ClassVar[str] = "PACT"
    paper: ClassVar[str] = "arXiv 2504.08966"
    merges: ClassVar[Merges] = "some"

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.cutoff is None):
            raise BudgetError("PACT takes either `keep`, or a `cutoff`, from which it follows.")
        if self.keep is not None:
            check_keep(self.keep)
        if self.faithful and self.cutoff is None:
            raise BudgetError("With faithful=True the authors' thresholds decide; give a `cutoff`.")
        if not 0 < self.share <= 1:
            raise BudgetError(
                f"share={self.share!r} is not a share of the tokens; choose at most 1."
            )
        for name in ("cutoff", "reach"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise BudgetError(f"{name}={value!r} is not a distance; choose 0 or more.")

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> PACT:
        """Before layer 4 of 28, scaled to another depth."""
        return cls(keep, max(1, round(4 * shape.decoder.layers / 28)))

    def stages(self) -> Sequence[Stage]:
        """One stage, before layer K, which reads this layer ahead."""
        return [
            Stage(
                self.layer,
                self._select,
                _read,
                ahead=True,
                merges=True,
                proportional=self.proportional,
                in_place=True,
            )
        ]

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse a layer that the decoder does not have."""
        check_layer(self.layer, family, model)

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image that enter every decoder layer."""
        if self.keep is None:
            raise BudgetError(
                "How many tokens a `cutoff` leaves depends on the image; give `keep` for a number "
                "that is known in advance."
            )
        return super().counts(visual, layers)

    def _select(self, view: View) -> Selection:
        layout, seen = view.layout, view.attention
        assert isinstance(seen, _Seen)
        features, keys = view.features, layout.gather(seen.keys)
        with torch.no_grad():
            scores = seen.attention * torch.linalg.vector_norm(widened(features), dim=-1)
            check_finite(scores[layout.valid])
        counts = None if self.keep is None else view.budget(self.keep)
        sizes = widened(torch.ones_like(features[..., 0]) if view.sizes is None else view.sizes)
        keep, states, merged = torch.zeros_like(layout.valid), features, False
        new_sizes = sizes.clone()
        for i, images in enumerate(_sets(layout, self.faithful)):
            where = layout.valid[images].nonzero()
            at = torch.tensor(images, device=where.device)[where[:, 0]], where[:, 1]
            with torch.no_grad():
                count = None if counts is None else counts[i]
                found = self._cluster(scores[at], keys[at], count)
            centres = at[0][found.centres], at[1][found.centres]
            keep[centres] = True
            if bool((found.labels >= 0).sum() > len(found.centres)):
                merged = True
                means, total = merge(features[at], sizes[at], found)
                states = states.index_put(centres, means)
                new_sizes[centres] = total
        if not merged:
            return Selection(keep)
        if self.faithful:  # what gives their logarithm again
            new_sizes = new_sizes.half().log().to(new_sizes).exp()
        return Selection(keep, states, sizes=new_sizes if self.proportional else None)

    def _cluster(self, scores: Tensor, keys: Tensor, count: int | None) -> Clusters:
        """The clusters of n tokens with these scores (n,) and keys (n, d): `count`, if given."""
        going = int(len(scores) * self.share)
        if count is not None:
            going = max(going, count)
        if going == 0:
            raise BudgetError(
                f"share={self.share} of {len(scores)} visual tokens rounds down to none; choose a "
                "larger one."
            )
        on = top_k(scores[None], [going])[0].nonzero()[:, 0]
        between = distances(keys[on], keys[on])
        between.fill_diagonal_(0.0)
        rank = inverse(
            by_score(density(between)[None], torch.ones_like(on, dtype=torch.bool)[None])
        )
        if count is None:
            assert self.cutoff is not None
            cutoff, centres = self.cutoff, greedy_centres(between, rank[0], self.cutoff)
        else:
            cutoff, centres = exact_centres(between, rank[0], count)
        return assign(keys, on, on[centres], None if self.reach is None else self.reach * cutoff)


@dataclass(frozen=True)
class _Seen:
    """What is read of layer K.

    Attributes:
        attention: (I, t) what the mean query pays every visual token.
        keys: (B, L, d) keys after RoPE, of all key heads together, at least float32.
    """

    attention: Tensor
    keys: Tensor


class Clusters(NamedTuple):
    """Clusters of n tokens.

    Attributes:
        centres: (C,) which tokens are centres, ascending.
        labels: (n,) which of the C clusters a token is in; -1 for none.
    """

    centres: Tensor
    labels: Tensor


def _sets(layout: Layout, joined: bool) -> list[list[int]]:
    """Which images' tokens are taken as one set: each by itself, or those of a sample together."""
    if not joined:
        return [[i] for i in range(len(layout.images))]
    sets: dict[int, list[int]] = {}
    for i, image in enumerate(layout.images):
        sets.setdefault(image.row, []).append(i)
    return list(sets.values())


def _read(attention: LayerAttention) -> _Seen:
    """What the mean query pays, and keys after RoPE."""
    layout, plain = attention.layout, attention.without_rope
    batch, _, length, _ = plain.query.shape
    ends = layout.columns.masked_fill(~layout.valid, 0).amax(1)
    last = ends.new_zeros(batch).scatter_reduce(0, layout.rows, ends, "amax")
    window = torch.arange(length, device=last.device) <= last[:, None]
    query = mean_query(plain.query, window & layout.tokens)
    # As the token at the end of the window, which sees it all and nothing behind it.
    mean = replace(plain, query=query.expand_as(plain.query), mask=None, window=None, hides=False)
    index = last[layout.rows][:, None]
    paid = mean.weights(index, corrected=False)[:, :, 0].mean(1)
    start = attention.past.shape[1]
    keys = attention.key[:, :, start : start + length].transpose(1, 2).flatten(2)
    return _Seen(paid, widened(keys))


def mean_query(query: Tensor, window: Tensor) -> Tensor:
    """(B, H, 1, d) the mean of queries (B, H, L, d) over the tokens of a window (B, L) bool."""
    among = window[:, None, :, None]
    total = widened(query).masked_fill(~among, 0.0).sum(2, keepdim=True)
    return total / among.sum(2, keepdim=True).clamp(min=1)


def distances(one: Tensor, other: Tensor) -> Tensor:
    """(n, m) 1 minus the cosine, at least 0, of keys (n, d) and (m, d)."""
    return (1 - cosine(one[None], other[None])[0]).clamp(min=0.0)


def density(between: Tensor, width: float = 2.0) -> Tensor:
    """(n,) how dense tokens lie around each, itself included, from distances (n, n)."""
    return torch.exp(-((between / width) ** 2)).sum(-1)


def greedy_centres(between: Tensor, rank: Tensor, cutoff: float) -> Tensor:
    """The centres: from the densest down, every token with no centre within the cutoff.

    In every round all tokens without a denser one nearby that is still undecided become centres at
    once, which comes to the same.

    Args:
        between: (n, n) distances, 0 on the diagonal.
        rank: (n,) 0 for the densest.
        cutoff: Distance.

    Returns:
        (n,) bool.
    """
    near = between <= cutoff
    centres = torch.zeros_like(rank, dtype=torch.bool)
    left = torch.arange(len(rank), device=rank.device)
    while len(left):
        place = rank[left]
        new = left[~(near[left][:, left] & (place < place[:, None])).any(1)]
        centres[new] = True
        left = left[~near[left][:, new].any(1)]
    return centres


def exact_centres(between: Tensor, rank: Tensor, count: int) -> tuple[float, Tensor]:
    """Exactly `count` centres, and the cutoff that they come from.

    The number of centres falls as the cutoff grows, nearly always. The smallest cutoff that leaves
    no more than `count` is sought by bisection; if it leaves fewer, the densest other tokens are
    added.

    Args:
        between: (n, n) distances, 0 on the diagonal.
        rank: (n,) 0 for the densest.
        count: From 1 to n.

    Returns:
        The cutoff, and (n,) bool.
    """
    cutoff, centres = 0.0, greedy_centres(between, rank, 0.0)
    if int(centres.sum()) > count:
        low, cutoff = 0.0, float(between.max())
        centres = greedy_centres(between, rank, cutoff)
        for _ in range(_STEPS):
            if int(centres.sum()) == count:
                break
            middle = (low + cutoff) / 2
            found = greedy_centres(between, rank, middle)
            if int(found.sum()) > count:
                low = middle
            else:
                cutoff, centres = middle, found
    missing = count - int(centres.sum())
    others = torch.where(centres, len(rank), rank).argsort()[:missing]
    centres[others] = True
    return cutoff, centres


def assign(keys: Tensor, on: Tensor, centres: Tensor, reach: float | None) -> Clusters:
    """Put tokens into the clusters of their nearest centres.

    Args:
        keys: (n, d) keys.
        on: (m,) the tokens that were clustered.
        centres: (C,) those of them that are centres.
        reach: How far a token may lie from its centre; None: as far as it likes if it was
            clustered, and not at all otherwise.
    """
    nearest, labels = distances(keys, keys[centres]).min(1)
    if reach is None:
        inside = torch.zeros_like(labels, dtype=torch.bool).index_fill(0, on, True)
    else:
        inside = nearest <= reach
    labels = labels.masked_fill(~inside, -1)
    labels[centres] = torch.arange(len(centres), device=labels.device)
    return Clusters(centres, labels)


def merge(states: Tensor, sizes: Tensor, found: Clusters) -> tuple[Tensor, Tensor]:
    """The mean state and the size of every cluster.

    Args:
        states: (n, D) states.
        sizes: (n,) how many tokens each stands for already.
        found: The clusters.

    Returns:
        (C, D) means of states, each token counted once; and (C,) sizes.
    """
    members = one_hot(found.labels + 1, len(found.centres) + 1)[:, 1:].to(sizes.dtype)
    wide = widened(states)
    means = members.T.to(wide.dtype) @ wide / members.sum(0).to(wide.dtype)[:, None]
    return means.to(states.dtype), members.T @ sizes
