"""What a method that acts in the vision tower declares, what its rule sees, what it decides.

A method that keeps the patches with the largest features:

    def stages(self):
        return [TowerStage(self._select)]

    def _select(self, view):
        counts = view.budgets(self.keep)
        norms = view.features.float().norm(dim=-1)
        return view.select(top_k(norms, counts, view.shown), counts)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pore.errors import BudgetError
from pore.layout import Tiling
from pore.tensors.gathering import pack, take
from pore.tensors.pooling import Pooling
from pore.tensors.selection import budget, even_shares

TowerAttention = Literal["cls", "received", "mean", "pooled"]
"""Attention within a picture, in the tower layer that the projector reads, to what becomes a visual
token: that of the CLS token ("cls"; in a tower without one, the same as "received"); the mean over
all queries ("received"); that of the mean of all patches' queries to the mean key of each token's
patches, with a softmax over the tokens ("mean"); or that of the pooling head after the tower, which
SigLIP can have ("pooled"; without one, the same as "mean")."""


@dataclass(frozen=True)
class Prompts:
    """What a rule in the vision tower knows of the prompts.

    Attributes:
        rows: Of each of the I images or tiles, the prompt that it belongs to.
        texts: Token ids of every prompt, without visual tokens and padding.
    """

    rows: list[int]
    texts: list[list[int]]


@dataclass(frozen=True)
class TowerView:
    """What the rule of a stage in the vision tower sees, of all I images of a call.

    In a family that cuts images into tiles, each of the I is a tile. Of a video each is a frame, or
    the frames that the tower takes together.

    Where the model makes a visual token of several patches, by pixel shuffle or by their mean, each
    of the N "patches" here is such a token, which has one feature. Only `queries` and `keys` are of
    the tower's own n tokens; `pooled` takes what is computed from them to the N.

    Attributes:
        features: (I, N, C) the patch features that the projector would get; where tokens are made
            of patches after the projector (frames in LLaVA-OneVision), those tokens.
        cls_feature: (I, C) the CLS token's feature of the same layer. None in a tower without CLS,
            and where a visual token is made of several patches, so that it is wider than CLS.
        cls_attention: (S, I, H, N) attention of the CLS token to the patches in the S layers asked
            for, after a softmax over CLS and patches; at least float32, without a graph. In a tower
            without CLS: the mean attention that each patch receives. For a visual token of several
            patches: the mean of theirs.
        queries: Of each of the S layers (I, H, n, d), from which that attention is computed; CLS
            first.
        keys: Likewise.
        raster: (I, N) the patch that every feature stands for; other than 0 to N - 1 where blocks
            have merged.
        tilings: Of every image, in a family that cuts images into tiles, and of every video: the
            tiles of the first image come first among the I, then those of the second. None where
            images go in one piece.
        grid: (height, width) of the N, in a tower that takes images of any shape; a rule is then
            called with one image or video at a time. None where they are a square.
        pooling: Of which of the tower's patches every visual token is made; None where of one.
        real: (I, n) bool, False at tokens of the tower that are padding, which attention does not
            see; None where there are none.
        beside: How many visual tokens each of the I has beside the N. They stay, and count in the
            budget: the CLS token of a frame in Video-LLaVA.
        prompts: The prompts that the images came with; None unless the stage has `prompts=True`.
    """

    features: Tensor
    cls_feature: Tensor | None
    cls_attention: Tensor
    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    raster: Tensor
    tilings: tuple[Tiling, ...] | None = None
    grid: tuple[int, int] | None = None
    pooling: Pooling | None = None
    real: Tensor | None = None
    beside: int = 0
    prompts: Prompts | None = None

    @property
    def has_cls(self) -> bool:
        """Whether token 0 of `queries` and `keys` is a CLS token."""
        patches = self.features.shape[1] if self.pooling is None else self.pooling.patches
        return any(key.shape[2] > patches for key in self.keys)

    def pooled(self, values: Tensor) -> Tensor:
        """From the tower's patches to the visual tokens: the mean over the patches of each.

        Args:
            values: (I, n, ...) of the tower's tokens, CLS first if it has one, or of its patches.

        Returns:
            (I, N, ...), or (I, N + 1, ...) where CLS was first, and still is.
        """
        if self.pooling is None:
            return values
        cls = values.shape[1] - self.pooling.patches
        return torch.cat([values[:, :cls], self.pooling.means(values[:, cls:], 1)], 1)

    @property
    def tiles(self) -> list[int]:
        """Into how many tiles each image is cut; 1 where images go in one piece."""
        if self.tilings is None:
            return [1] * len(self.features)
        return [tiling.tiles for tiling in self.tilings]

    @property
    def of_frames(self) -> bool:
        """Whether the I are the frames of videos."""
        return self.tilings is not None and any(tiling.of_frames for tiling in self.tilings)

    @property
    def shown(self) -> Tensor:
        """(I, N) bool, False at patches of nothing but padding, which have no placeholder."""
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
        """How many tokens `keep` means for every one of the I images or tiles.

        The tokens of an image are shared out evenly among its tiles, those of a video among its
        frames. Where a tile shows fewer than its share, the rest goes to the others, from the
        first.

        Raises:
            BudgetError: An image has fewer, or more are to stay whatever is kept.
        """
        if self.tilings is None:
            return [budget(keep, self.features.shape[1])] * len(self.features)
        shown: list[int] = self.shown.sum(1).tolist()
        found: list[int] = []
        for tiling in self.tilings:
            room = shown[len(found) : len(found) + tiling.tiles]
            always = self.beside * tiling.tiles
            total = budget(keep, sum(room) + always)
            if total <= always and always:
                raise BudgetError(
                    f"keep={keep} is {total} tokens of a video of {tiling.tiles} frames, each of "
                    f"which keeps its CLS token; ask for more than {always}."
                )
            found += even_shares(total - always, room)
        return found

    def select(self, mask: Tensor, counts: Sequence[int], structure: bool = True) -> TowerSelection:
        """Keep some of the patches, in raster order.

        Args:
            mask: (I, N) bool, the patches that stay.
            counts: How many patches each of the I keeps: the sums of `mask`.
            structure: Whether tokens that show no patch (the end of a row of tiles) stay.

        Returns:
            The selection.
        """
        if min(counts) == mask.shape[1]:
            # A copy may have another memory layout, and sums over it may then round differently.
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
            decoder is to see them. Where tiles are laid side by side in the prompt
            (`Tiling.apart` is False), the prompt's order counts instead, see `order`.
        raster: (I, k) the patch that each stands for. Merged features count as the patch they were
            merged into; the CLS token and what stands for no single patch have -1, and come last
            in the prompt's order.
        valid: (I, k) bool, False where one of the I keeps fewer than k; None where all keep k.
        structure: Whether tokens that show no patch (the end of a row of tiles) stay. They are
            also dropped if some feature stands for no single patch, as there are no rows then.
        order: (I, k) for methods that lay tiles out in a way of their own: the rank of each feature
            among those of its image, -1 for what is left out. Structure then goes. None is the
            prompt's order.
    """

    features: Tensor
    raster: Tensor
    valid: Tensor | None = None
    structure: bool = True
    order: Tensor | None = None


@dataclass(frozen=True)
class Encoded:
    """The output of the vision tower and the projector for one image.

    Attributes:
        features: (tiles, N, C) all its patch features, as the tower gives them to the projector,
            one for each visual token; an image in one piece is one tile, and of a video every frame
            is one.
        projected: (tiles, k, D) what the projector made of the k that a stage in the tower kept; of
            all N where no stage acts there.
        attention: (tiles, H, N) attention to each of the N, at least float32: of every kind that a
            stage asks for, see `TowerAttention`.
        pooled: (tiles, C) what a pooling head makes of each tile, at least float32; None without
            one, and where no stage asks for "pooled".
    """

    features: Tensor
    projected: Tensor
    attention: Mapping[TowerAttention, Tensor]
    pooled: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """The tokens of one tower block between attention and MLP, where they can be merged.

    Attributes:
        number: Index of the block, from 0.
        count: How many blocks there are up to the one whose output the projector reads.
        layers: How many blocks the tower has.
        patches: How many patches an image has before any merging.
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
        rule: Decides what goes on to the projector. It runs outside of any autocast. It should
            compute scores without a graph; kept and merged features have theirs.
        layers: Gives the layers whose attention the rule reads, from the index of the layer whose
            output the projector reads and the number of layers of the tower. The default is the
            former alone.
        merge: Called in every block up to the one that the projector reads, after its attention;
            gives the block with fewer states, and their sizes and rasters. None merges nothing.
        proportional: Whether a token that was merged from several counts that often in attention.
        merges: Whether the rule gives tokens that stay new features.
        prompts: Whether the rule reads `TowerView.prompts`; not in towers that take images in one
            sequence.
    """

    rule: Callable[[TowerView], TowerSelection]
    layers: Callable[[int, int], Sequence[int]] = lambda read, count: [read]
    merge: Callable[[Block], Block] | None = None
    proportional: bool = False
    merges: bool = False
    prompts: bool = False
