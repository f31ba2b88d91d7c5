"""PruMerge+: PruMerge on the patches that stand out and on others at even distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pore.engine.pruner import Pruner
from pore.engine.stages import Merges
from pore.errors import BudgetError, InputError
from pore.methods.prumerge import (
    attention_and_keys,
    check_counts,
    check_room,
    check_settings,
    check_whole,
    last_layer,
    merged,
    outliers,
    with_rest,
)
from pore.tensors.gathering import inverse
from pore.tensors.selection import by_score
from pore.tower.stages import TowerSelection, TowerStage, TowerView

Rule = Literal["effivlm", "vtc-cls", "prumerge"]


# For each budget, the number of best patches and the distance of the others, for 576 patches.
_VTC_CLS = {64: (13, 11), 128: (40, 6), 256: (95, 3)}


@dataclass(frozen=True)
class PruMergePlus(Pruner):
    """PruMerge on patches that stand out and on others at even distances (arXiv 2403.15388).

    Kept are the best by CLS attention, then patches of a regular grid over the raster order that
    are not among them; merging and the extra token are PruMerge's. The decoder gets the best by
    descending attention, the grid in raster order, the extra token.

    The authors' method has no budget. Published comparisons that need one use one of three rules
    for the number of best patches and the density of the grid. Here each of them gives exactly
    `keep` tokens: a surplus is cut off the end of the grid, and missing ones are filled up by
    attention.

    Attributes:
        keep: Tokens left per image (int), or the fraction of its patches (float), including the
            extra token. None is the authors' adaptive count: the outliers of PruMerge, and a grid
            of about three times as many.
        rule: For a given `keep`: "effivlm", all outliers and a grid of `keep` patches
            (EffiVLM-Bench); "vtc-cls", fixed numbers for 64, 128 and 256 tokens (the baseline of
            VTC-CLS); "prumerge", half of them best and half grid (what the authors train with).
        neighbours: How many patches are merged into each; all others if there are fewer.
        faithful: Count as the rule's code does. "effivlm" adds the extra token to the budget, and
            uses the mean number of outliers over all images of a call; "vtc-cls" gives about the
            budget (at 576 patches 66 for 64); "prumerge" takes `keep` as the share of the best, and
            as many again from a grid, which repeats some of the best and so loses as many of the
            first other patches; a grid with another number is an error. The adaptive count takes
            one image at a time, and truncates as in PruMerge.
    """

    keep: int | float | None = None
    rule: Rule = "effivlm"
    neighbours: int = 32
    faithful: bool = False

    name: ClassVar[str] = "PruMerge+"
    paper: ClassVar[str] = "arXiv 2403.15388; rules: EffiVLM-Bench, arXiv 2412.05819"
    merges: ClassVar[Merges] = "all"

    def __post_init__(self) -> None:
        check_settings(self.keep, self.neighbours)
        if self.rule not in get_args(Rule):
            raise BudgetError(
                f"rule must be one of {', '.join(get_args(Rule))}, not {self.rule!r}."
            )
        if self.keep is not None and self.rule == "vtc-cls" and self.keep not in _VTC_CLS:
            raise BudgetError(
                f"The rule of VTC-CLS is for {', '.join(map(str, _VTC_CLS))} tokens, not "
                f"{self.keep}; choose rule='effivlm'."
            )

    def stages(self) -> Sequence[TowerStage]:
        """One stage, in the tower."""
        return [TowerStage(self._select, layers=last_layer, merges=True)]

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image that enter every decoder layer."""
        check_counts(self.keep, self.faithful)
        return super().counts(visual, layers)

    def _select(self, view: TowerView) -> TowerSelection:
        shown = view.shown
        sizes: list[int] = shown.sum(1).tolist()
        scores, metric = attention_and_keys(view)
        far: list[int] = outliers(scores, shown).tolist()
        counts: list[int] | None = None
        if self.faithful:
            check_whole(view)
            if self.rule == "prumerge" and self.keep is not None:
                return self._select_as_in_training(view, scores, metric)
            grids, counts = self._authors_grids(sizes[0], far)
        elif self.keep is None:
            grids = [_adaptive(n, max(best, 1)) for n, best in zip(sizes, far, strict=True)]
        else:
            totals = view.budgets(self.keep)
            if totals == sizes:
                return view.select(shown, totals)
            counts = [total - 1 for total in totals]
            grids = [self._grid(*row) for row in zip(sizes, counts, far, strict=True)]
        order, chosen = best_then_grid(scores, shown, grids)
        counts = chosen.tolist() if counts is None else counts
        if self.faithful:
            check_room(counts, sizes[0])
        counts = [min(n, size - 1) for n, size in zip(counts, sizes, strict=True)]
        return merged(view, scores, metric, order, counts, self.neighbours)

    def _grid(self, size: int, patches: int, far: int) -> Grid:
        """How the rule chooses `patches` of `size`, of which `far` are outliers."""
        if self.rule == "effivlm":
            return Grid(max(far, 1), 0, max(size // max(patches, 1), 1), size)
        if self.rule == "vtc-cls":
            assert isinstance(self.keep, int)
            best, step = _VTC_CLS[self.keep]
            return Grid(best, 0, step, size - 1)
        step = max(2 * size // max(patches, 1), 1)
        return Grid(patches // 2, step // 2, step, size - 1)

    def _authors_grids(self, size: int, far: list[int]) -> tuple[list[Grid], list[int] | None]:
        """The grids, and how many patches of each image stay; None if all that these choose."""
        if self.keep is None:
            if len(far) > 1:
                raise InputError(
                    f"The authors' adaptive rule takes one image at a time, not {len(far)}; "
                    "leave `faithful` off, or encode them one by one."
                )
            if far[0] == 0:
                raise InputError(
                    "No patch of the image stands out, and the authors' adaptive rule does not "
                    "cover this case; leave `faithful` off, or give `keep`."
                )
            return [_adaptive(size, far[0])._replace(best=int(size * (far[0] / size)))], None
        if self.rule == "vtc-cls":
            return [self._grid(size, 0, 0)] * len(far), None
        count = self.keep if isinstance(self.keep, int) else max(int(self.keep * size), 1)
        share = sum(found / size for found in far) / len(far)
        return [self._grid(size, count, int(size * share))] * len(far), [count] * len(far)

    def _select_as_in_training(
        self, view: TowerView, scores: Tensor, metric: Tensor
    ) -> TowerSelection:
        """A grid that repeats some of the best patches, and so loses others."""
        assert self.keep is not None
        images, size = scores.shape
        ratio = self.keep if isinstance(self.keep, float) else self.keep / size
        step, count = int(1 / ratio), int(size * ratio)
        places = range(step // 2, size - 1, step)
        if count == 0 or len(places) != count:
            raise BudgetError(
                f"The authors' code stops with an error unless grid and best patches are equally "
                f"many and at least 1: here {len(places)} and {count} of {size}. Choose another "
                "share (an eighth of 576 works), or faithful=False."
            )
        best = scores.argsort(dim=-1, descending=True, stable=True)[:, :count]
        grid = torch.tensor(places, device=best.device, dtype=torch.long)
        kept = torch.cat([best, grid.expand(images, -1)], 1)
        check_room([kept.shape[1]], size)
        others = torch.ones_like(scores, dtype=torch.bool).scatter_(1, kept, False)
        repeated = others.sum(1, keepdim=True) - (size - kept.shape[1])
        others &= others.cumsum(1) > repeated
        valid = torch.ones(images, kept.shape[1] + 1, dtype=torch.bool, device=kept.device)
        selection = with_rest(view, scores, metric, kept, valid, others, self.neighbours)
        return replace(selection, valid=None)


class Grid(NamedTuple):
    """How many of the best patches to take, and the places of the others in raster order.

    Attributes:
        best: Number of the best by attention.
        start: Place of the first patch of the grid.
        step: Distance from one to the next.
        end: The place after the last that may belong to the grid.
    """

    best: int
    start: int
    step: int
    end: int


def _adaptive(size: int, best: int) -> Grid:
    """The authors' grid if `best` of `size` patches stand out: about three times as many."""
    return Grid(best, 0, max(int(int(1 / (best / max(size, 1))) / 3), 1), size - 1)


def best_then_grid(scores: Tensor, valid: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, Tensor]:
    """Put the best first, by descending score, then the others of the grid, then all that are left.

    Args:
        scores: (I, N) scores.
        valid: (I, N) bool, the patches to choose from.
        grids: One for every row; its places are among the valid patches.

    Returns:
        order (I, N), every patch once; those left are in descending order of score, those not valid
        come last. And counts (I,), the number of the best and the others of the grid together.
    """
    best, start, step, end = torch.tensor(grids, device=scores.device)[..., None].unbind(1)
    n = scores.shape[1]
    rank = inverse(by_score(scores, valid))
    first = valid & (rank < best)
    place = valid.cumsum(-1) - 1
    grid = valid & ~first & (place >= start) & (place < end) & ((place - start) % step == 0)
    key = torch.where(first, rank, torch.where(grid, place + n, rank + 2 * n))
    return key.argsort(-1), (first | grid).sum(-1)
