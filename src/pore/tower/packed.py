"""Pruning in vision towers that take all images in one sequence: Qwen-VL's, Pixtral.

The rule is called for one image after the other. Only the tokens that it keeps go through the
projector. Then every token is put back where it came from, with zeros in between, so that it keeps
its place on the axes of M-RoPE. The engine drops the zeros before the first decoder layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pore.errors import BudgetError, ModelStateError
from pore.layout import Layout, Packing
from pore.tensors.attention import received_attention
from pore.tensors.precision import scoring
from pore.tower.run import Placed, TowerRun
from pore.tower.stages import Encoded, TowerSelection, TowerView


class PackedTowerRun(TowerRun):
    """`TowerRun` of a tower without CLS token that takes all images in one sequence.

    Patches and tokens are held here in raster order, image after image. The tower may have them in
    another order, such as window after window, and `Packing` tells which.
    """

    _packing: Packing
    _to_raster: Tensor | None  # (T,) where in the sequence each token is; None: in raster order
    _parts: dict[int, list[tuple[Tensor, Tensor]]]  # of every layer, as its kernel got them
    _scaling: float
    _rasters: list[Tensor] | None  # (k,) of every image: the patches kept; None: nobody chose
    _slots: list[Tensor]  # (k,) of every image: the placeholder that each token fills
    _projected: list[Tensor]  # (k, D) of every image
    _remembered: list[Tensor]  # (1, H, N) of every image: attention, where it is to be remembered
    _all_kept: bool

    def encoded(self, image: int) -> Encoded:
        """What the tower made of an image, if it was to be remembered."""
        features = torch.split(self._features, self._packing.counts)[image]
        attention = self._remembered[image] if self._attended else None
        return Encoded(features[None], self._projected[image][None], attention)

    def placed(self, layout: Layout, numbers: Sequence[int], features: Tensor) -> Placed:
        """Which placeholders hold the tokens that the stage kept."""
        assert self._rasters is not None
        keep, raster = torch.zeros_like(layout.valid), torch.zeros_like(layout.raster)
        for i, number in enumerate(numbers):
            slots = self._slots[number].to(keep.device)
            keep[i, slots], raster[i, slots] = True, self._rasters[number].to(keep.device)
        return Placed(keep, raster)

    # -- hooks ------------------------------------------------------------------------------------

    def _before_tower(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._packing = packing = self._family.packing(self._model, args, kwargs)
        self._to_raster = None if packing.order is None else packing.order.argsort()
        self._parts = {}
        self._rasters = None

    def _observe(
        self, i: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, *_: object
    ) -> None:
        # Kernels for one sequence after another are called for every image by itself.
        self._parts.setdefault(i, []).append((query, key))
        self._scaling = scaling

    def _note_features(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._features = self._by_token(args[0])
        for i in self._attended:
            with scoring():
                self._remembered = [
                    self._received(query, key)
                    for query, key in zip(*self._by_image(i), strict=True)
                ]
        if self._stage is None:
            self._parts = {}

    def _before_projector(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        states = args[0]
        layers = {i: self._by_image(i) for i in self._read}
        self._parts = {}
        self._all_kept = True
        kept, self._rasters = [], []
        for image, features in enumerate(torch.split(self._by_token(states), self._packing.counts)):
            read = [(layers[i][0][image], layers[i][1][image]) for i in self._read]
            view = self._view(features, self._packing.grids[image], read)
            selection = self._choose(view)
            self._check_merged(view, selection)
            self._all_kept = self._all_kept and selection.features is view.features
            chosen, raster = _kept_of(selection)
            kept.append(chosen)
            self._rasters.append(raster)
        self._slots = list(map(slots_of, self._rasters, self._packing.counts))
        if self._all_kept:
            return None
        left = torch.cat(kept)
        left = left[None] if states.dim() == 3 else left.reshape(-1, *states.shape[1:])
        return (left, *args[1:])

    def _after_projector(self, _: nn.Module, __: object, output: Tensor) -> Tensor | None:
        counts, shape = self._packing.counts, output.shape
        output = output.flatten(0, -2)  # some projectors return a batch of one
        whole = self._rasters is None or self._all_kept
        if whole:
            self._projected = list(torch.split(self._in_raster(output, 0), counts))
            self._slots = [torch.arange(n, device=output.device) for n in counts]
        else:
            self._projected = list(torch.split(output, [len(slots) for slots in self._slots]))
        self._first = torch.stack([projected[0] for projected in self._projected]).detach()
        self._first_slot = torch.stack([slots[0] for slots in self._slots])
        if whole:
            return None
        filled = torch.cat(
            [
                output.new_zeros(n, output.shape[-1]).index_copy(0, slots, projected)
                for n, slots, projected in zip(counts, self._slots, self._projected, strict=True)
            ]
        )
        order = self._packing.order
        filled = filled if order is None else filled[order]
        return filled.view(*shape[:-2], *filled.shape)

    # -- from the order of the tower to raster order ----------------------------------------------

    def _in_raster(self, states: Tensor, dim: int) -> Tensor:
        """States of the sequence's tokens, T along a dimension, in raster order."""
        return states if self._to_raster is None else states.index_select(dim, self._to_raster)

    def _by_token(self, states: Tensor) -> Tensor:
        """(T, g * C) features of the tokens, from states as the projector gets them."""
        return self._in_raster(states.reshape(sum(self._packing.counts), -1), 0)

    def _by_image(self, i: int) -> tuple[list[Tensor], list[Tensor]]:
        """Queries and keys (1, H, n, d) of every image; the patches of a token lie together."""
        queries, keys = (
            self._split(torch.cat(parts, 2)) for parts in zip(*self._parts[i], strict=True)
        )
        return queries, keys

    def _split(self, patches: Tensor) -> list[Tensor]:
        """Split the patches of the whole sequence into those of every image, (1, H, n, d)."""
        _, heads, _, width = patches.shape
        if self._packing.groups is None:
            tokens = patches.view(1, heads, -1, self._packing.patches, width)
            tokens = self._in_raster(tokens, 2)
        else:
            tokens = patches[:, :, self._packing.groups.to(patches.device)]
        return [image.flatten(2, 3) for image in torch.split(tokens, self._packing.counts, 2)]

    # -- what the rule sees of an image -----------------------------------------------------------

    def _view(
        self, features: Tensor, grid: tuple[int, int], read: Sequence[tuple[Tensor, Tensor]]
    ) -> TowerView:
        """What the stage's rule sees of an image.

        Args:
            features: (N, C) features of its tokens.
            grid: (height, width) of them.
            read: Queries and keys of its patches, in every layer that the stage reads.
        """
        n, group = len(features), self._packing.patches
        with scoring():
            attention = [self._received(query, key) for query, key in read]
        return TowerView(
            features=features[None],
            cls_feature=None,
            cls_attention=torch.stack(attention) if attention else features.new_empty(0),
            queries=tuple(query for query, _ in read),
            keys=tuple(key for _, key in read),
            raster=torch.arange(n, device=features.device)[None],
            grid=grid,
            groups=torch.arange(n * group, device=features.device).view(n, group),
        )

    def _received(self, query: Tensor, key: Tensor) -> Tensor:
        """(1, H, N) attention that the tokens of an image receive, the mean of their patches'."""
        weights = received_attention(query, key, self._scaling)
        return weights.view(*weights.shape[:2], -1, self._packing.patches).mean(-1)

    def _check_merged(self, view: TowerView, selection: TowerSelection) -> None:
        """Refuse new features from a stage that does not say that it merges.

        The decoder adds further features to the original tokens (`deepstack`).
        """
        assert self._stage is not None
        if self._stage.merges or selection.features is view.features:
            return
        features, raster = _kept_of(selection)
        if bool((raster < 0).any()) or not torch.equal(features, view.features[0, raster]):
            raise ModelStateError(
                "A rule in the vision tower gives new features to tokens that stay, without saying "
                "so; make its stage with merges=True."
            )


def _kept_of(selection: TowerSelection) -> tuple[Tensor, Tensor]:
    """Features (k, C) and raster (k,) of what is kept of one image."""
    if selection.valid is None:
        return selection.features[0], selection.raster[0]
    valid = selection.valid[0]
    return selection.features[0, valid], selection.raster[0, valid]


def slots_of(raster: Tensor, n: int) -> Tensor:
    """The placeholder of an image that every kept token fills.

    A token fills the placeholder of its patch. A merged rest, which stands for no patch, fills one
    of a dropped token: of 6 tokens, [4, -1, 0] fill the placeholders [4, 5, 0].

    Args:
        raster: (k,) the patch that each stands for, -1 for none.
        n: Tokens of the image.

    Returns:
        (k,) different placeholders; tokens that stand for no patch get the last free ones.

    Raises:
        BudgetError: There are fewer.
    """
    free = torch.ones(n, dtype=torch.bool, device=raster.device)
    free[raster[raster >= 0]] = False
    places, count = free.nonzero()[:, 0], int((raster < 0).sum())
    if count > len(places):
        raise BudgetError(
            f"{len(raster)} tokens are left of an image that the prompt has {n} for; keep fewer."
        )
    slots = raster.clone()
    slots[raster < 0] = places[len(places) - count :]
    return slots
