"""Pruning in vision towers that take all images in one sequence: Qwen-VL's, Pixtral.

The rule is called for one image after the other; for a video once, with all its frames. Only the
tokens that it keeps go through the projector. Then every token is put back where it came from, with
zeros in between, so that it keeps its place on the axes of M-RoPE. The engine drops the zeros
before the first decoder layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pore.errors import BudgetError, ModelStateError
from pore.layout import Layout, Packing, Tiling
from pore.tensors.attention import mean_attention, received_attention
from pore.tensors.pooling import Pooling
from pore.tensors.precision import scoring
from pore.tower.run import Placed, TowerRun
from pore.tower.stages import Encoded, TowerAttention, TowerSelection, TowerView


class PackedTowerRun(TowerRun):
    """`TowerRun` of a tower without CLS token that takes all images in one sequence.

    Patches and tokens are held here in raster order, image after image, and in a video frame after
    frame. The tower may have them in another order, such as window after window, and `Packing`
    tells which.
    """

    _packing: Packing
    _images: list[_Image]
    _to_raster: Tensor | None  # (T,) where in the sequence each token is; None: in raster order
    _parts: dict[int, list[tuple[Tensor, Tensor]]]  # of every layer, as its kernel got them
    _scaling: float
    _rasters: list[Tensor] | None  # (k,) of every image: the patches kept; None: nobody chose
    _slots: list[Tensor]  # (k,) of every image: the placeholder that each token fills
    _projected: list[Tensor]  # (k, D) of every image
    _remembered: list[dict[TowerAttention, Tensor]]  # (T, H, N) of every image, of every kind
    _all_kept: bool

    def encoded(self, image: int) -> Encoded:
        """What the tower made of an image, if it was to be remembered."""
        features, projected = self._split(self._features)[image], self._projected[image]
        frames, n = self._images[image].frames, self._images[image].tokens
        whole = projected.view(frames, n, -1) if len(projected) == frames * n else projected[None]
        return Encoded(features.view(frames, n, -1), whole, self._remembered[image])

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
        frames = [tiling.frames for tiling in self._tilings or ()]
        if sum(frames) != len(packing.grids):  # images, whose tiling nobody notes
            frames = [1] * len(packing.grids)
        firsts = [sum(frames[:i]) for i in range(len(frames))]
        pairs = zip(frames, firsts, strict=True)
        self._images = [_Image(count, packing.grids[first]) for count, first in pairs]
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
        self._remembered = [{} for _ in self._images]
        if self._attend:
            pairs = zip(*self._by_image(self._attended), strict=True)
            for held, (query, key) in zip(self._remembered, pairs, strict=True):
                held.update({kind: self._attention(query, key, kind) for kind in self._attend})
        if self._stage is None:
            self._parts = {}

    def _before_projector(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        states = args[0]
        layers = {i: self._by_image(i) for i in self._read}
        self._parts = {}
        self._all_kept = True
        kept, self._rasters = [], []
        self._slots = []
        for image, features in enumerate(self._split(self._by_token(states))):
            read = [(layers[i][0][image], layers[i][1][image]) for i in self._read]
            view = self._view(features, self._images[image], read)
            selection = self._choose(view)
            self._check_merged(view, selection)
            self._all_kept = self._all_kept and selection.features is view.features
            chosen, raster, slots = _kept_of(selection, view.features.shape[1])
            kept.append(chosen)
            self._rasters.append(raster)
            self._slots.append(slots)
        if self._all_kept:
            return None
        left = torch.cat(kept)
        left = left[None] if states.dim() == 3 else left.reshape(-1, *states.shape[1:])
        return (left, *args[1:])

    def _after_projector(self, _: nn.Module, __: object, output: Tensor) -> Tensor | None:
        counts, shape = [image.count for image in self._images], output.shape
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

    def _split(self, tokens: Tensor) -> Sequence[Tensor]:
        """(T, ...) of the tokens of the sequence, image by image."""
        return torch.split(tokens, [image.count for image in self._images])

    def _by_image(self, i: int) -> tuple[list[Tensor], list[Tensor]]:
        """Queries and keys (T, H, n, d) of every image's T frames; the patches of a token lie
        together."""
        queries, keys = (
            self._patches(torch.cat(parts, 2)) for parts in zip(*self._parts[i], strict=True)
        )
        return queries, keys

    def _patches(self, patches: Tensor) -> list[Tensor]:
        """Split the patches of the whole sequence into those of every image, (T, H, n, d)."""
        _, heads, _, width = patches.shape
        if self._packing.groups is None:
            tokens = patches.view(1, heads, -1, self._packing.patches, width)
            tokens = self._in_raster(tokens, 2)
        else:
            tokens = patches[:, :, self._packing.groups.to(patches.device)]
        split = torch.split(tokens, [image.count for image in self._images], 2)
        return [
            part.view(heads, image.frames, -1, width).transpose(0, 1)
            for part, image in zip(split, self._images, strict=True)
        ]

    # -- what the rule sees of an image -----------------------------------------------------------

    def _view(
        self, features: Tensor, image: _Image, read: Sequence[tuple[Tensor, Tensor]]
    ) -> TowerView:
        """What the stage's rule sees of an image.

        Args:
            features: (T * N, C) features of its tokens.
            image: How many they are.
            read: Queries and keys of its patches, in every layer that the stage reads.
        """
        frames, n, group = image.frames, image.tokens, self._packing.patches
        attention = [self._attention(query, key, "received") for query, key in read]
        every = torch.arange(n * group, device=features.device).view(n, group)
        video = Tiling(frames, None, n, tuple(range(frames * n)), of_frames=True)
        return TowerView(
            features=features.view(frames, n, -1),
            cls_feature=None,
            cls_attention=torch.stack(attention) if attention else features.new_empty(0),
            queries=tuple(query for query, _ in read),
            keys=tuple(key for _, key in read),
            raster=torch.arange(n, device=features.device).expand(frames, -1),
            tilings=(video,) if frames > 1 else None,
            grid=image.grid,
            pooling=Pooling(every, n * group),
        )

    def _attention(self, query: Tensor, key: Tensor, kind: TowerAttention) -> Tensor:
        """(T, H, N) attention to the tokens of an image, the mean of that to their patches."""
        group = self._packing.patches
        with scoring():
            if kind == "mean":
                means = key.reshape(*key.shape[:2], -1, group, key.shape[-1]).mean(3)
                return mean_attention(query, means, self._scaling)
            weights = received_attention(query, key, self._scaling)
            return weights.view(*weights.shape[:2], -1, group).mean(3)

    def _check_merged(self, view: TowerView, selection: TowerSelection) -> None:
        """Refuse new features from a stage that does not say that it merges.

        The decoder adds further features to the original tokens (`deepstack`).
        """
        assert self._stage is not None
        if self._stage.merges or selection.features is view.features:
            return
        features, raster, _ = _kept_of(selection, view.features.shape[1])
        own = view.features.flatten(0, 1)
        if bool((raster < 0).any()) or not torch.equal(features, own[raster]):
            raise ModelStateError(
                "A rule in the vision tower gives new features to tokens that stay, without saying "
                "so; make its stage with merges=True."
            )


@dataclass(frozen=True)
class _Image:
    """An image, or a video, in the sequence.

    Attributes:
        frames: Its number of frames T.
        grid: (height, width) of a frame in tokens.
    """

    frames: int
    grid: tuple[int, int]

    @property
    def tokens(self) -> int:
        """Tokens of a frame, N."""
        return self.grid[0] * self.grid[1]

    @property
    def count(self) -> int:
        """Its tokens."""
        return self.frames * self.tokens


def _kept_of(selection: TowerSelection, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features (k, C), raster (k,) and placeholders (k,) of what is kept of one image.

    Args:
        selection: What is kept of each of its frames.
        n: Tokens of a frame.
    """
    features, raster, slots = [], [], []
    for frame, kept in enumerate(selection.features):
        own = selection.raster[frame]
        if selection.valid is not None:
            kept, own = kept[selection.valid[frame]], own[selection.valid[frame]]
        features.append(kept)
        raster.append(torch.where(own < 0, own, own + frame * n))
        slots.append(slots_of(own, n) + frame * n)
    return torch.cat(features), torch.cat(raster), torch.cat(slots)


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
