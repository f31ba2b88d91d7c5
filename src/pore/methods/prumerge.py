"""PruMerge: keep the patches that the CLS token attends to, and merge similar ones into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pore.engine.pruner import Pruner
from pore.engine.stages import Merges
from pore.errors import BudgetError, InputError, ScoreError
from pore.tensors.attention import mean_over_queries, received_attention
from pore.tensors.gathering import inverse, widened
from pore.tensors.merging import add_neighbours, weighted_sum
from pore.tensors.selection import by_score, check_keep
from pore.tower.stages import TowerSelection, TowerStage, TowerView


@dataclass(frozen=True)
class PruMerge(Pruner):
    """Keep the patches with the most CLS attention, and merge similar ones in (arXiv 2403.15388).

    The attention is computed in the tower's last layer, taken as one head of full width. To every
    kept patch the sum of its 32 nearest patches is added, which may be kept ones: nearest by cosine
    of the keys of that layer, and weighted by their attention, which is not normalised. One extra
    token, the last, is the same sum over all patches that are not kept. The decoder gets them by
    descending attention.

    In a tower without a CLS token (SigLIP) patches are ranked by the attention they receive,
    averaged over all queries. If the model cuts images into tiles, every tile has its share of the
    budget and its own extra token. Keeping all patches leaves the image as it is.

    Attributes:
        keep: Tokens left per image (int), or the fraction of its patches (float), including the
            extra token. None is the authors' adaptive count: the patches whose attention lies above
            the third quartile by more than 1.5 times the distance of the quartiles, at least one,
            and the extra token.
        neighbours: How many patches are merged into each; all others if there are fewer.
        faithful: Count as the authors' code does: `keep` patches, or int(keep * patches), plus the
            extra token. The adaptive count then uses quartiles over all images of a call together,
            so that images affect each other, and is truncated (at some sizes to one less than there
            are outliers; to the extra token alone if there are none).
    """

    keep: int | float | None = None
    neighbours: int = 32
    faithful: bool = False

    name: ClassVar[str] = "PruMerge"
    paper: ClassVar[str] = "arXiv 2403.15388"
    merges: ClassVar[Merges] = "all"

    def __post_init__(self) -> None:
        check_settings(self.keep, self.neighbours)

    def stages(self) -> Sequence[TowerStage]:
        """One stage, in the tower."""
        return [TowerStage(self._select, layers=last_layer, merges=True)]

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image that enter every decoder layer."""
        check_counts(self.keep, self.faithful)
        return super().counts(visual, layers)

    def _select(self, view: TowerView) -> TowerSelection:
        shown = view.shown
        sizes = shown.sum(1).tolist()
        scores, metric = attention_and_keys(view)
        if self.faithful:
            check_whole(view)
            counts = [self._authors_count(scores)] * len(scores)
            check_room(counts, sizes[0])
        elif self.keep is None:
            far = outliers(scores, shown).tolist()
            counts = [min(max(n, 1), size - 1) for n, size in zip(far, sizes, strict=True)]
        else:
            totals = view.budgets(self.keep)
            if totals == sizes:
                return view.select(shown, totals)
            counts = [total - 1 for total in totals]
        order = by_score(scores, shown)
        return merged(view, scores, metric, order, counts, self.neighbours)

    def _authors_count(self, scores: Tensor) -> int:
        if isinstance(self.keep, int):
            return self.keep
        if self.keep is not None:
            return int(scores.shape[1] * self.keep)
        together = scores.reshape(1, -1)
        far = int(outliers(together, torch.ones_like(together, dtype=torch.bool)))
        return int(scores.shape[1] * (far / scores.numel()))


def check_settings(keep: int | float | None, neighbours: int) -> None:
    """Refuse settings that cannot be meant."""
    if keep is not None:
        check_keep(keep)
    if neighbours < 0:
        raise BudgetError(f"neighbours={neighbours} is not a number of patches; choose 0 or more.")


def check_counts(keep: int | float | None, faithful: bool) -> None:
    """Refuse to predict a number of tokens that depends on the image."""
    if keep is None or faithful:
        raise BudgetError(
            "These settings do not fix how many tokens are left; give `keep`, and leave "
            "`faithful` off, for a number that is known in advance."
        )


def check_whole(view: TowerView) -> None:
    """Refuse tiles, which the authors' code does not support."""
    if view.tilings is not None:
        raise InputError(
            "The authors' code takes images in one piece; leave `faithful` off for a model that "
            "cuts them into tiles."
        )


def check_room(counts: Sequence[int], patches: int) -> None:
    """Refuse settings that would give the decoder more tokens than an image comes with."""
    if max(counts) >= patches:
        raise BudgetError(
            f"The authors' code makes {max(counts) + 1} tokens from {patches} patches with these "
            "settings; keep fewer, or leave `faithful` off."
        )


def last_layer(_: int, count: int) -> Sequence[int]:
    """The tower's last layer, after the one whose features LLaVA reads."""
    return [count - 1]


def attention_and_keys(view: TowerView) -> tuple[Tensor, Tensor]:
    """Scores (I, N) and keys (I, N, C) of the patches, with all heads taken as one."""
    query, key = (widened(x[0].transpose(1, 2).flatten(2)) for x in (view.queries, view.keys))
    scores = view.pooled(single_head_attention(query, key, view.has_cls, view.real))
    if not bool(torch.isfinite(scores).all()):
        raise ScoreError(
            "Attention of the vision tower's last layer holds NaN or infinity, so no patches can "
            "be chosen; look for overflow, damaged weights or bad pixels."
        )
    return scores, view.pooled(key)[:, -scores.shape[1] :]


def single_head_attention(
    query: Tensor, key: Tensor, cls: bool, real: Tensor | None = None
) -> Tensor:
    """Attention to the patches, not split into heads.

    Args:
        query: (I, n, C) queries of all heads side by side, without scale.
        key: (I, n, C) keys.
        cls: Whether token 0 is a CLS token, whose attention this is; otherwise it is the mean over
            all queries.
        real: (I, n) bool, False at padding; None where there is none.

    Returns:
        (I, N) weights; the CLS token's own column is cut off without renormalising.
    """
    if not cls:
        return received_attention(query[:, None], key[:, None], query.shape[-1] ** -0.5, real)[:, 0]
    logits = query[:, :1] @ key.mT * query.shape[-1] ** -0.5
    return mean_over_queries(logits, real)[:, cls:]


def outliers(scores: Tensor, valid: Tensor) -> Tensor:
    """How many scores of every row lie far above the others: Q3 + 1.5 (Q3 - Q1).

    Args:
        scores: (I, N) scores.
        valid: (I, N) bool.

    Returns:
        (I,) counts. Quartiles are interpolated linearly.
    """
    at = torch.tensor([0.25, 0.75], dtype=scores.dtype, device=scores.device)
    low, high = scores.masked_fill(~valid, torch.nan).nanquantile(at, dim=-1)
    far: Tensor = (scores > (high + 1.5 * (high - low))[:, None]) & valid
    return far.sum(-1)


def merged(
    view: TowerView,
    scores: Tensor,
    metric: Tensor,
    order: Tensor,
    counts: Sequence[int],
    neighbours: int,
) -> TowerSelection:
    """The first patches of an order, with similar ones merged in, and the rest as one token.

    Args:
        view: The tower's patches.
        scores: (I, N) their weights in sums.
        metric: (I, N, d) the vectors whose similarity counts.
        order: (I, N) every patch once.
        counts: How many patches of each row stay besides the token of the rest; -1 for a row
            without it.
        neighbours: How many patches are merged into each.

    Returns:
        The selection.
    """
    stay = torch.tensor(counts, device=order.device)[:, None]
    others = view.shown & (inverse(order) >= stay)
    kept = order[:, : max(counts)]
    valid = torch.arange(kept.shape[1] + 1, device=order.device) < stay
    valid[:, -1:] = stay >= 0
    selection = with_rest(view, scores, metric, kept, valid, others, neighbours)
    return selection if min(counts) < max(counts) else replace(selection, valid=None)


def with_rest(
    view: TowerView,
    scores: Tensor,
    metric: Tensor,
    kept: Tensor,
    valid: Tensor,
    others: Tensor,
    neighbours: int,
) -> TowerSelection:
    """Kept patches (I, k) with similar ones merged in, and one token for the `others` (I, N).

    `valid` (I, k + 1) is False where a row keeps fewer, or has no token of the rest.
    """
    features = view.features
    tokens = add_neighbours(features, metric, scores, kept, valid[:, :-1], others, neighbours)
    tokens = torch.cat([tokens, weighted_sum(features, scores, others)], 1)
    raster = torch.nn.functional.pad(view.raster.gather(1, kept), (0, 1), value=-1)
    return TowerSelection(tokens, raster, valid)
