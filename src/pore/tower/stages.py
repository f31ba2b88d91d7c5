"""What a method declares of the vision tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pore.layout import Tiling
from pore.tensors.gathering import pack, take
from pore.tensors.selection import budget, even_shares


@dataclass(frozen=True)
class TowerView:
    """What the rule of a stage in the vision tower sees, of all images of a call.

    Where the model makes a visual token of several patches, by pixel shuffle or by their mean, each
    of the N "patches" here is such a token, which has one feature; only `queries` and `keys` are of
    the tower's own patches, and `pooled` takes what is computed from them to the tokens.

    Attributes:
        features: (I, N, C) the patch features that the projector would get.
        cls_feature: (I, C) the CLS token's feature of the same layer; None in a tower without, and
            where tokens are made of several patches, for which it is not as wide as they are.
        cls_attention: (S, I, H, N) attention of the CLS token to the patches in the S layers asked
            for, after a softmax over CLS and patches; at least float32, without a graph. In a tower
            without CLS the mean attention that the patches receive. Of a token of several patches,
            their mean.
        queries: S tensors (I, H, n, d), as that attention is computed from; CLS first.
        keys: S tensors (I, H, n, d), likewise.
        raster: (I, N) the patch that every feature stands for, where blocks have merged.
        tilings: Of every image, in a family that cuts images into tiles; then each of the I is a
            tile, those of one image behind one another. None where images go in one piece.
        grid: (height, width) of the N in a tower that takes images of any shape, for which a rule
            is called with one image at a time; None where they are a square.
        groups: (N, g) the tower's patches that every token is made of; None where it is one.
        real: (I, n) bool, False at tokens of the tower that are padding, which attention does not
            see; None where there are none.
    """

    features: Tensor
    cls_feature: Tensor | None
    cls_attention: Tensor
    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    raster: Tensor
    tilings: tuple[Tiling, ...] | None = None
    grid: tuple[int, int] | None = None
    groups: Tensor | None = None
    real: Tensor | None = None

    @property
    def has_cls(self) -> bool:
        """Whether token 0 of `queries` and `keys` is a CLS token."""
        patches = self.features.shape[1] if self.groups is None else self.groups.numel()
        return any(key.shape[2] > patches for key in self.keys)

    def pooled(self, values: Tensor) -> Tensor:
        """Means of what the tower's patches have, over the patches that a token is made of.

        Args:
            values: (I, n, ...) of the tower's tokens, CLS first if it has one, or of its patches.

        Returns:
            (I, N, ...), or (I, N + 1, ...) with what CLS has first.
        """
        if self.groups is None:
            return values
        cls = values.shape[1] - self.groups.numel()
        means = values[:, cls:][:, self.groups].mean(2)
        return torch.cat([values[:, :cls], means], 1)

    @property
    def shown(self) -> Tensor:
        """(I, N) bool, False at patches of nothing but padding, which the decoder never gets."""
        count, n = self.features.shape[:2]
        if self.tilings is None:
            return torch.ones(count, n, dtype=torch.bool, device=self.features.device)
        shown = torch.zeros(count, n, dtype=torch.bool)
        first = 0
        for tiling in self.tilings:
            slots = torch.tensor(tiling.shown)
            shown[first + slots // tiling.patches, slots % tiling.patches] = True
            first += tiling.tiles
        return shown.to(self.features.device)

    def budgets(self, keep: int | float) -> list[int]:
        """The number of tokens that `keep` means for every one of the I images or tiles.

        The tokens of an image are shared out evenly among its tiles; what a tile does not show goes
        to the next ones that do, from the first.

        Raises:
            BudgetError: An image has fewer.
        """
        if self.tilings is None:
            return [budget(keep, self.features.shape[1])] * len(self.features)
        shown: list[int] = self.shown.sum(1).tolist()
        found: list[int] = []
        for tiling in self.tilings:
            room = shown[len(found) : len(found) + tiling.tiles]
            found += even_shares(budget(keep, sum(room)), room)
        return found

    def select(self, mask: Tensor, counts: Sequence[int], structure: bool = True) -> TowerSelection:
        """Keep some of the patches, in raster order.

        Args:
            mask: (I, N) bool, the patches that stay.
            counts: How many of every image, the sums of `mask`.
            structure: Whether tokens that show no patch (the end of a row) stay.

        Returns:
            The selection.
        """
        if min(counts) == mask.shape[1]:
            # Not a copy, whose memory may be laid out otherwise, so that sums round otherwise.
            return TowerSelection(self.features, self.raster, None, structure)
        widest = max(counts)
        order, valid = pack(mask, width=widest)
        filled = valid if min(counts) < widest else None
        return TowerSelection(
            take(self.features, order), self.raster.gather(1, order), filled, structure
        )


@dataclass(frozen=True)
class TowerSelection:
    """What a stage in the vision tower decides.

    Attributes:
        features: (I, k, C) the features that go on to the projector, in the order in which the
            decoder will see them.
        raster: (I, k) the patch that each stands for; of merged ones the patch they are merged
            into, and -1 for the CLS token and for what stands for no single patch. Where the
            prompt does not have every tile apart, the order is the prompt's, and those of -1 come
            last.
        valid: (I, k) bool, False where an image keeps fewer; None where all keep as many.
        structure: Whether tokens that show no patch (the end of a row of tiles) stay. They go also
            where features stand for no single patch, as rows then have no end.
        order: (I, k) for methods that lay tiles out in a way of their own: the rank of each feature
            among those of its image, -1 for what is left out; structure then goes. None is the
            prompt's order.
    """

    features: Tensor
    raster: Tensor
    valid: Tensor | None = None
    structure: bool = True
    order: Tensor | None = None


@dataclass(frozen=True)
class Encoded:
    """What the vision tower and the projector made of one image.

    Attributes:
        features: (tiles, N, C) patch features, as the tower gives them to the projector; one tile
            where images go in one piece.
        projected: (tiles, k, D) what the projector made of those that a stage in the tower kept,
            or of all.
    """

    features: Tensor
    projected: Tensor


@dataclass(frozen=True)
class Block:
    """The tokens of one tower block between attention and MLP, where they can be merged.

    Attributes:
        number: Index of the block, from 0.
        count: Blocks up to the one whose output the projector reads.
        layers: All blocks of the tower.
        patches: Patches of an image, before any merging.
        states: (I, n, C) the tokens, CLS first in a tower that has one.
        keys: (I, H, n, d) keys of this block's attention.
        sizes: (I, n) how many tokens of the tower's input each stands for.
        raster: (I, n) the patch that each stands for, -1 for CLS.
        has_cls: Whether token 0 is CLS.
    """

    number: int
    count: int
    layers: int
    patches: int
    states: Tensor
    keys: Tensor
    sizes: Tensor
    raster: Tensor
    has_cls: bool


@dataclass(frozen=True)
class TowerStage:
    """One place in the vision tower where a method drops or merges patches.

    Only what it keeps is projected, and the decoder never sees the rest: positions are numbered
    anew, as in the authors' code of the methods that act here.

    Attributes:
        rule: Decides what goes on to the projector. It runs out of any autocast; what is chosen by
            should have no graph, what is kept or merged has.
        layers: Given the index of the layer whose output the projector reads, and the number of
            layers of the tower: the layers whose attention the rule reads.
        merge: Called in every block up to the one that the projector reads, after its attention;
            gives the block with fewer states, and their sizes and rasters. None merges nothing.
        proportional: Whether attention weighs every token by its size once blocks have merged.
        merges: Whether the rule gives tokens that stay new features.
    """

    rule: Callable[[TowerView], TowerSelection]
    layers: Callable[[int, int], Sequence[int]] = lambda read, count: [read]
    merge: Callable[[Block], Block] | None = None
    proportional: bool = False
    merges: bool = False
