"""DART: a few pivot tokens, and the visual tokens that duplicate them least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pore.engine.limits import check_layer
from pore.engine.readers import LayerAttention
from pore.engine.stages import Selection, Stage, View
from pore.errors import BudgetError
from pore.families.base import Family
from pore.methods._checks import check_whole
from pore.methods.scorer import BudgetPruner
from pore.tensors.gathering import cosine, inverse, widened
from pore.tensors.selection import budget, by_score, check_scores


@dataclass(frozen=True)
class DART(BudgetPruner):
    """Keep the visual tokens that duplicate the others least (arXiv 2502.11494).

    Before layer K, the tokens whose keys in layer K - 1 (after RoPE, all key heads together) have
    the largest L1 norm become pivots: some of the image's own, and some of the text after it. The
    image's pivots stay. Every pivot in turn then picks the visual tokens that are least like it,
    by the cosine of the states entering layer K after the decoder's final norm; the next pivots
    cannot pick them again. Kept tokens keep their positions.

    Exactly `keep` tokens stay: the rest of the budget, besides the image's pivots, is divided
    evenly among the pivots, and the first ones pick one more if it does not divide. Pivots pick in
    the order of the norm, the image's first. A budget below `image_pivots` keeps only the first of
    the image's pivots.

    The authors' code gives every pivot the same number of picks, rounded down, so that it keeps
    more or fewer than asked: 132 for 128, with four pivots of each kind. It also visits the pivots
    in the order of a Python set of their positions in the prompt. `faithful=True` does both, in
    CPython's order.

    The authors' pivots for Qwen2.5-VL are 5 of the image and 3 of the text. In a prompt with
    several images, every image uses the text that follows it, without the tokens of other images.
    If a prompt has fewer text tokens than `text_pivots`, all of them are pivots (the authors' code
    fails).

    The norm of a rotated key depends on its position. `generate` numbers the tokens of a prompt
    from the first that is not padding, and with right padding so does a plain forward. With left
    padding a plain forward counts the padding, unless it is given `position_ids`, and can then
    choose other pivots than for each prompt alone.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
        layer: K, the 0-based index of the first pruned layer.
        image_pivots: Pivots among the image's tokens.
        text_pivots: Pivots among the text tokens after the image.
        faithful: Whether to keep as many as the authors' code does, in its order.
    """

    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4
    faithful: bool = False

    name: ClassVar[str] = "DART"
    paper: ClassVar[str] = "arXiv 2502.11494"
    reads_positions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(0, image_pivots=self.image_pivots, text_pivots=self.text_pivots)
        if self.image_pivots + self.text_pivots == 0:
            raise BudgetError("Without any pivot no token can be picked; ask for at least one.")

    def stages(self) -> Sequence[Stage]:
        """One stage, before layer K."""
        return [Stage(self.layer, self._select, _read_norms)]

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse a layer that the decoder lacks."""
        check_layer(self.layer, family, model)

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image that enter every decoder layer."""
        kept = budget(self.keep, visual)
        if self.faithful:
            pivots = torch.tensor(self.image_pivots + self.text_pivots)
            picks = int(self._picks(torch.tensor(visual), pivots))
            kept = min(visual, self.image_pivots + int(pivots) * picks)
        return [visual] * self.layer + [kept] * (layers - self.layer)

    def _picks(self, visual: Tensor, pivots: Tensor) -> Tensor:
        """Number of picks of each pivot in the authors' code."""
        if isinstance(self.keep, int):
            return self.keep // pivots
        return (visual.double() * self.keep / pivots).long()

    def _select(self, view: View) -> Selection:
        layout, norms = view.layout, view.attention
        valid, device = layout.valid, norms.device
        visual, visual_norms = view.norm(widened(view.features)), layout.gather(norms)
        own, is_own = largest(visual_norms, self.image_pivots, valid)
        text, is_text = largest(norms[layout.rows], self.text_pivots, layout.text_after)
        images = torch.arange(len(own), device=device)[:, None]
        texts = view.norm(widened(view.hidden_states[layout.rows[:, None], text]))
        similarity = cosine(torch.cat([visual[images, own], texts], 1), visual)
        found = torch.cat([is_own, is_text], 1)
        counts = torch.tensor(view.budget(self.keep), device=device)
        check_scores(similarity.masked_fill(~found[..., None], 0.0).sum(1), counts, valid)
        if self.faithful:
            n = [len(image.columns) for image in layout.images]
            picks = self._picks(torch.tensor(n, device=device), found.sum(-1))
            quota = found * picks[:, None]
            columns = torch.cat([layout.columns[images, own], text], 1)
            places = layout.tokens.cumsum(-1)[layout.rows] - 1  # in the prompt without padding
            order = set_order(places.gather(1, columns), found)
        else:
            order = torch.arange(found.shape[1], device=device).expand_as(found)
            is_own = is_own & (order[:, : own.shape[1]] < counts[:, None])
            quota = shares(counts - is_own.sum(-1), torch.cat([is_own, is_text], 1))
        pivots = torch.zeros_like(valid).scatter(1, own, is_own)
        return Selection(pivots | least_similar(similarity, order, quota, valid & ~pivots))


def key_norms(key: Tensor) -> Tensor:
    """L1 norm of every token's key, over all key heads together.

    Args:
        key: (B, G, L, d) keys after the rotation, not repeated for grouped queries.

    Returns:
        (B, L) norms, at least float32.
    """
    return widened(key).abs().sum((1, 3))


def _read_norms(attention: LayerAttention) -> Tensor:
    """(B, L) key norms of this forward's tokens, 0 at padding."""
    start, length = attention.past.shape[1], attention.query.shape[2]
    norms = key_norms(attention.key[:, :, start : start + length])
    return norms.masked_fill(~attention.layout.tokens, 0.0)


def largest(norms: Tensor, count: int, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens with the largest norm; of equal ones the earlier.

    Args:
        norms: (I, n) norms.
        count: How many to take of each row.
        valid: (I, n) bool, the tokens to choose from.

    Returns:
        index (I, P), by falling norm, where P is `count`, or n if that is less; and found (I, P)
        bool, False where a row has fewer valid tokens.
    """
    index = by_score(norms, valid)[:, :count]
    return index, valid.gather(1, index)


def shares(total: Tensor, exists: Tensor) -> Tensor:
    """Divide picks evenly among pivots; the first get one more if the number does not divide.

    Args:
        total: (I,) picks.
        exists: (I, P) bool, False where an image has no such pivot.

    Returns:
        (I, P) picks of each, 0 where there is none; each row sums to its total if it has a pivot.
    """
    pivots = exists.sum(-1, keepdim=True).clamp(min=1)
    place = exists.cumsum(-1) - 1
    total = total[:, None]
    return (total // pivots + (place < total % pivots)) * exists


def set_order(places: Tensor, found: Tensor) -> Tensor:
    """The order in which CPython iterates over a set of positions that is built in the given order.

    Args:
        places: (I, P) positions; where `found`, those of a row are all different.
        found: (I, P) bool, False where a row has fewer.

    Returns:
        (I, P) indices into the rows; entries that are not `found` come last.
    """
    orders = []
    for row, ok in zip(places.tolist(), found.tolist(), strict=True):
        index = {place: i for i, place in enumerate(row) if ok[i]}
        # From a list: a set made from the dictionary would know its size, which changes the order.
        chosen = list(index)
        order = [index[place] for place in set(chosen)]
        orders.append(order + [i for i in range(len(row)) if not ok[i]])
    return torch.tensor(orders, device=places.device)


def least_similar(similarity: Tensor, order: Tensor, quota: Tensor, candidates: Tensor) -> Tensor:
    """Let every pivot in turn pick the candidates that are least similar to it.

    Args:
        similarity: (I, P, t) similarity of every pivot and every token.
        order: (I, P) the pivots in the order in which they pick.
        quota: (I, P) how many each may pick; if there are fewer candidates, it takes all.
        candidates: (I, t) bool, the tokens that can be picked.

    Returns:
        (I, t) bool, the tokens picked; of equal ones the earlier.
    """
    left, images = candidates, torch.arange(len(order), device=order.device)
    for pivot in order.unbind(1):
        likeness = similarity[images, pivot].masked_fill(~left, torch.inf)
        rank = inverse(likeness.argsort(dim=-1, stable=True))
        left = left & ~(rank < quota[images, pivot, None])
    return candidates & ~left
