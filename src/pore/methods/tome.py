"""ToMe: merge similar patches in every block of the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
from torch import nn

from pore.engine.pruner import Pruner
from pore.engine.stages import Limit, Merges
from pore.errors import BudgetError
from pore.families.base import Family
from pore.tensors.gathering import widened
from pore.tensors.merging import bipartite_matching
from pore.tensors.selection import budget, check_keep
from pore.tower.stages import Block, TowerSelection, TowerStage, TowerView


@dataclass(frozen=True)
class ToMe(Pruner):
    """Merge pairs of patches with similar keys in every block of the tower (arXiv 2210.09461).

    Between attention and MLP of every block up to the one whose output the projector reads, the
    patches are dealt alternately to two sets; those of the first that are most similar to one of
    the second, by cosine of this block's keys (mean over heads), are merged into it. A merged patch
    is the mean of all that went into it, and attention counts it as many times (the log of its size
    is added to the logits). The tower's sequence really gets shorter. The CLS token is never
    merged.

    The authors have no code for LLaVA. Patches come to the decoder in the order that merging
    leaves, which is not raster order. In a tower without CLS token (SigLIP) all patches take part.

    Attributes:
        keep: Patches left per image (int), or the fraction of them (float). All blocks merge the
            same number, or one more in the first blocks if it does not divide evenly; a block that
            would merge more than half of its patches merges half, and the others more.
        r: Instead of `keep`, how many patches every block merges, as in the authors' code: one
            number; a tuple (r, inflection) for numbers that fall from 2r to 0 (inflection -1), rise
            from 0 to 2r (1) or anything between, truncated; or a list with one number for every
            block, where missing ones are 0. A block never merges more than half of its patches. The
            numbers are for all blocks of the tower; those after the one that the projector reads
            do not matter.
        proportional: Whether attention counts a patch by its size.
        weighted: Whether the mean counts a patch by its size. LightCompress's ToMe for LLaVA has
            neither.
    """

    keep: int | float | None = None
    r: int | tuple[int, float] | list[int] | None = None
    proportional: bool = True
    weighted: bool = True

    name: ClassVar[str] = "ToMe"
    paper: ClassVar[str] = "arXiv 2210.09461"
    merges: ClassVar[Merges] = "all"

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.r is None):
            raise BudgetError("ToMe takes either `keep`, or `r` for every block.")
        if self.keep is not None:
            check_keep(self.keep)
        if self.r is not None:
            parse_r(2, self.r)

    def stages(self) -> Sequence[TowerStage]:
        """One stage, in all blocks of the tower."""
        return [
            TowerStage(
                _all_that_is_left,
                layers=lambda read, count: [],  # `merge` gets its keys itself
                merge=self._merge,
                proportional=self.proportional,
            )
        ]

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image that enter every decoder layer."""
        if self.keep is None:
            raise BudgetError(
                "How many tokens `r` leaves depends on the tower's blocks; give `keep` for a "
                "number that is known in advance."
            )
        return super().counts(visual, layers)

    def limits(self, family: Family) -> list[Limit]:
        """A budget cannot be met if tiles show padding."""
        found = super().limits(family)
        if self.keep is not None and family.tiles:
            found.append(
                Limit(
                    "it cannot meet a budget: all tiles lose equally many patches, but some show "
                    "padding, which the decoder never gets. Give `r` instead of `keep`."
                )
            )
        return found

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse a budget that the tower's blocks cannot reach."""
        if self.keep is None:
            return
        grid = family.grid(model)
        if grid is not None:
            patches = grid[0] * grid[1]
            even_schedule(patches, budget(self.keep, patches), family.tower_read(model) + 1)

    def _merge(self, block: Block) -> Block:
        cls = int(block.has_cls)
        patches = block.states.shape[1] - cls
        if self.keep is not None:
            keep = budget(self.keep, block.patches)
            count = even_schedule(block.patches, keep, block.count)[block.number]
        else:
            assert self.r is not None
            count = min(parse_r(block.layers, self.r)[block.number], patches // 2)
        if count <= 0:
            return block
        matching = bipartite_matching(widened(block.keys).mean(1), count, bool(cls))
        weights = block.sizes if self.weighted else torch.ones_like(block.sizes)
        return replace(
            block,
            states=matching.means(block.states, weights),
            sizes=matching.sums(block.sizes[..., None])[..., 0],
            raster=block.raster.gather(1, matching.places),
        )


def _all_that_is_left(view: TowerView) -> TowerSelection:
    return TowerSelection(view.features, view.raster)


def parse_r(layers: int, r: int | tuple[int, float] | list[int]) -> list[int]:
    """How many tokens every block merges, as the authors write it.

    Args:
        layers: Blocks of the tower.
        r: One number for all; (r, inflection); or a list, filled up with 0.

    Returns:
        One number for every block; more where the list is longer.

    Raises:
        BudgetError: `r` is none of these.
    """
    if isinstance(r, list):
        return r + [0] * (layers - len(r))
    if isinstance(r, int):
        return [r] * layers
    if not isinstance(r, tuple) or len(r) != 2:
        raise BudgetError(
            f"r={r!r} is neither a number, nor a pair (r, inflection), nor a list of numbers."
        )
    mean, inflection = r
    low = int(mean * (1 - inflection))
    step = (2 * mean - low - low) / max(layers - 1, 1)  # a single block gets `low`
    return [int(low + step * i) for i in range(layers)]


@cache
def even_schedule(patches: int, keep: int, blocks: int) -> tuple[int, ...]:
    """How many patches every block merges so that `keep` are left, as evenly as can be.

    A block merges at most half of its patches. Larger numbers come first: 17 in each of 16 blocks
    and 16 in the 7 after them leave 192 of 576.

    Args:
        patches: Patches that enter the first block.
        keep: Patches to leave.
        blocks: Blocks.

    Returns:
        One number for every block.

    Raises:
        BudgetError: This number of blocks cannot leave so few, or there are fewer patches.
    """
    least = patches
    for _ in range(blocks):
        least -= least // 2
    if not least <= keep <= patches:
        raise BudgetError(
            f"keep={keep} cannot be met: ToMe merges at most half of the patches in a block, so "
            f"{blocks} blocks leave {least} to {patches} of {patches}."
        )
    most = -(-(patches - keep) // blocks)
    while _left(patches, schedule := [most] * blocks) > keep:
        most += 1
    for i in reversed(range(blocks)):
        if _left(patches, schedule) == keep:
            break
        schedule[i] -= 1
    return tuple(_merged(patches, schedule))


def _merged(patches: int, schedule: Sequence[int]) -> list[int]:
    """How many patches blocks really merge when asked for these numbers."""
    merged = []
    for count in schedule:
        merged.append(min(count, patches // 2))
        patches -= merged[-1]
    return merged


def _left(patches: int, schedule: Sequence[int]) -> int:
    return patches - sum(_merged(patches, schedule))
