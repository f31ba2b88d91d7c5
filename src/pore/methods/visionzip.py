"""VisionZip: keep what the CLS token attends to, and merge the rest into a few tokens by key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pore.engine.stages import Merges
from pore.errors import BudgetError
from pore.methods.scorer import BudgetPruner
from pore.tensors.gathering import pack, take, widened
from pore.tensors.merging import add_group_means, nearest, strided
from pore.tensors.selection import top_k
from pore.tower.stages import TowerSelection, TowerStage, TowerView

# The authors' 54 + 10, of which all their budgets are multiples: 108 + 20, 162 + 30, 27 + 5.
_CONTEXTUAL_SHARE = 10 / 64


@dataclass(frozen=True)
class VisionZip(BudgetPruner):
    """Dominant patches and the CLS token stay, the other patches are merged (arXiv 2412.04467).

    In the tower layer that the projector reads: the patches with the most CLS attention, summed
    over heads, stay as they are, and so does the CLS token, which LLaVA otherwise drops. Of the
    other patches, `contextual` at even distances become targets; each of the rest goes to the
    target with the most similar key (mean over heads, cosine), and the mean of those that go to a
    target is added to it. The decoder gets CLS, the dominant patches in raster order, then the
    targets.

    A tower without a CLS token (SigLIP) has none to keep, and patches are ranked by the attention
    they receive, averaged over all queries. If a visual token is made of several patches, CLS is
    not as wide as a token and does not stay. Keeping all patches leaves the image as it is.

    Attributes:
        keep: Tokens left per image (int), or the fraction of its patches (float): CLS, dominant and
            contextual ones together.
        contextual: How many of them are merged ones; if the model cuts images into tiles, which
            share `keep`, then in every tile. None takes the authors' 10 in 64, rounded half to
            even: 30 of 192, 20 of 128, 10 of 64.
        faithful: Merge even if `keep` is the number of patches. The authors' code counts CLS as one
            more patch, so it then still keeps CLS and merges some.
    """

    contextual: int | None = None
    faithful: bool = False

    name: ClassVar[str] = "VisionZip"
    paper: ClassVar[str] = "arXiv 2412.04467"
    merges: ClassVar[Merges] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contextual is not None and self.contextual < 0:
            raise BudgetError(f"contextual={self.contextual} is not a number of merged tokens.")
        if isinstance(self.keep, int):
            self._merged([self.keep])

    def stages(self) -> Sequence[TowerStage]:
        """One stage, in the tower."""
        return [TowerStage(self._select, merges=True)]

    def _merged(self, counts: Sequence[int]) -> list[int]:
        """How many of `counts` tokens are contextual ones."""
        if self.contextual is None:
            return [round(count * _CONTEXTUAL_SHARE) for count in counts]
        if self.contextual >= max(counts):
            raise BudgetError(
                f"contextual={self.contextual} leaves no dominant token of {max(counts)}; ask for "
                f"at most {max(counts) - 1}."
            )
        return [min(self.contextual, max(count - 1, 0)) for count in counts]

    def _select(self, view: TowerView) -> TowerSelection:
        counts = view.budgets(self.keep)
        shown = view.shown
        if not self.faithful and counts == shown.sum(1).tolist():
            return view.select(shown, counts)
        features, raster = view.features, view.raster
        metric = view.pooled(widened(view.keys[0]).mean(1))
        merged = self._merged(counts)
        kept = [count - extra for count, extra in zip(counts, merged, strict=True)]
        if view.cls_feature is None:
            chosen = top_k(view.cls_attention[0].sum(1), kept, shown)
        else:
            features = torch.cat([view.cls_feature[:, None], features], 1)
            raster = torch.nn.functional.pad(raster, (1, 0), value=-1)
            patches = [max(count - 1, 0) for count in kept]
            chosen = top_k(view.cls_attention[0].sum(1), patches, shown)
            cls = torch.tensor(kept, device=chosen.device)[:, None] > 0
            chosen, shown = (torch.cat([cls, mask], 1) for mask in (chosen, shown))
        metric = metric[:, -features.shape[1] :]  # includes CLS only if it stays
        tokens, index, valid = zip_tokens(features, metric, chosen, shown & ~chosen, kept, merged)
        raster = raster.gather(1, index)
        return TowerSelection(tokens, raster, valid if min(counts) < max(counts) else None)


def zip_tokens(
    features: Tensor,
    metric: Tensor,
    dominant: Tensor,
    others: Tensor,
    kept: Sequence[int],
    merged: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Dominant tokens as they are, then the others merged into a few.

    Args:
        features: (I, n, C) tokens.
        metric: (I, n, d) the vectors whose similarity counts.
        dominant: (I, n) bool, the tokens that stay.
        others: (I, n) bool, the tokens to merge.
        kept: How many of each row stay.
        merged: How many merged tokens the others of each row become.

    Returns:
        tokens (I, k, C); index (I, k), the token that each stands for (for a merged one its
        target); and valid (I, k), False where a row has fewer.
    """
    index, valid = pack(dominant, width=max(kept))
    tokens = take(features, index)
    if max(merged) > 0:
        marks = strided(others, torch.tensor(merged, device=others.device))
        targets, real = pack(marks, width=max(merged))
        group = nearest(metric, targets, real)
        contextual, _ = add_group_means(features, targets, group, others & ~marks)
        tokens = torch.cat([tokens, contextual], 1)
        index, valid = torch.cat([index, targets], 1), torch.cat([valid, real], 1)
    return tokens, index, valid
