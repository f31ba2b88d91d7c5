"""Pruning in vision towers that take all images in one sequence: Qwen-VL's, Pixtral.

The rule is called for one image after the other. What it keeps goes through the projector alone;
behind it every token is put where it came from, with zeros between, so that it has its own place on
the axes of M-RoPE. The run then drops the zeros before the first decoder layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pore.errors import BudgetError, ModelStateError
from pore.layout import Packing
from pore.tensors.attention import received_attention
from pore.tensors.precision import scoring
from pore.tower.run import TowerRun
from pore.tower.stages import Encoded, TowerSelection, TowerView


class PackedTowerRun(TowerRun):
    """`TowerRun` of a tower without CLS token that takes all images in one sequence.

    All that is held here of patches and tokens is in raster order, image after image.
    """

    in_place = True
    _packing: Packing
    _sequence: Tensor | None  # (T,) which token of the raster order comes where; None: these do
    _raster: Tensor | None  # (T,) the inverse
    _parts: dict[int, list[tuple[Tensor, Tensor]]]  # of every layer, as its kernel got them
    _scaling: float
    _slots: list[Tensor]  # (k,) of every image, the tokens in whose stead those kept come
    _kept: list[Tensor]  # (k, D) of every image
    _whole: bool  # whether all were kept

    def tokens_of(self, image: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the decoder gets of an encoded image: features, places and slots."""
        assert self.selection is not None
        slots = self._slots[image]
        return self._kept[image], self.selection.raster[image, : len(slots)], slots

    def encoded(self, image: int) -> Encoded:
        """What was made of an encoded image; only where it was to be remembered."""
        features = torch.split(self._features, self._sizes_of)[image]
        return Encoded(features[None], self._kept[image][None])

    @property
    def _sizes_of(self) -> list[int]:
        return [height * width for height, width in self._packing.grids]

    def _before_tower(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._packing = packing = self._family.packing(self._model, args, kwargs)
        self._sequence = packing.order
        self._raster = None if packing.order is None else packing.order.argsort()
        self._parts = {}
        self.selection = None

    def _observe(
        self, i: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, *_: object
    ) -> None:
        # Kernels for one sequence after another are called for every image by itself.
        self._parts.setdefault(i, []).append((query, key))
        self._scaling = scaling

    def _in_raster(self, states: Tensor, dim: int) -> Tensor:
        """States of the sequence's tokens, T along a dimension, in raster order."""
        return states if self._raster is None else states.index_select(dim, self._raster)

    def _tokens_of_call(self, states: Tensor) -> Tensor:
        """(T, g * C) features of the tokens, of states as the projector gets them."""
        return self._in_raster(states.reshape(sum(self._sizes_of), -1), 0)

    def _note_features(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._features = self._tokens_of_call(args[0])

    def _of_layer(self, i: int) -> tuple[list[Tensor], list[Tensor]]:
        """Queries and keys (1, H, n, d) of every image's patches, those of a token side by side."""
        group = self._packing.patches
        found = []
        for parts in zip(*self._parts[i], strict=True):
            whole = torch.cat(parts, 2)
            _, heads, _, width = whole.shape
            if self._packing.groups is None:
                tokens = self._in_raster(whole.view(1, heads, -1, group, width), 2)
            else:
                tokens = whole[:, :, self._packing.groups.to(whole.device)]
            images = torch.split(tokens, self._sizes_of, 2)
            found.append([image.flatten(2, 3) for image in images])
        queries, keys = found
        return queries, keys

    def _before_projector(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        assert self._stage is not None
        states, group = args[0], self._packing.patches
        tokens = self._tokens_of_call(states)
        layers = {i: self._of_layer(i) for i in self._wanted}
        self._parts = {}
        self._whole = True
        kept = []
        for image, features in enumerate(torch.split(tokens, self._sizes_of)):
            n = len(features)
            read = {i: (query[image], key[image]) for i, (query, key) in layers.items()}
            with scoring():
                received = {i: self._received(query, key) for i, (query, key) in read.items()}
            attention = [received[i] for i in self._wanted]
            view = TowerView(
                features=features[None],
                cls_feature=None,
                cls_attention=torch.stack(attention) if attention else features.new_empty(0),
                queries=tuple(read[i][0] for i in self._wanted),
                keys=tuple(read[i][1] for i in self._wanted),
                raster=torch.arange(n, device=features.device)[None],
                grid=self._packing.grids[image],
                groups=torch.arange(n * group, device=features.device).view(n, group),
            )
            selection = self._choose(view)
            self._check_merged(view, selection)
            self._whole = self._whole and selection.features is view.features
            kept.append(_kept_of(selection))
        chosen, rasters = [features for features, _ in kept], [raster for _, raster in kept]
        self._slots = list(map(_slots, rasters, self._sizes_of))
        counts = torch.tensor([len(raster) for raster in rasters])
        self.selection = TowerSelection(
            features=nn.utils.rnn.pad_sequence(chosen, batch_first=True),
            raster=nn.utils.rnn.pad_sequence(rasters, batch_first=True),
            valid=torch.arange(int(counts.max())) < counts[:, None],
        )
        if self._whole:
            return None
        left = torch.cat(chosen)
        left = left[None] if states.dim() == 3 else left.reshape(-1, *states.shape[1:])
        return (left, *args[1:])

    def _received(self, query: Tensor, key: Tensor) -> Tensor:
        """(1, H, N) attention that the tokens of an image receive, the mean of their patches'."""
        weights = received_attention(query, key, self._scaling)
        return weights.view(*weights.shape[:2], -1, self._packing.patches).mean(-1)

    def _check_merged(self, view: TowerView, selection: TowerSelection) -> None:
        """Features that lower layers add go to tokens that stay what they were."""
        assert self._stage is not None
        if self._stage.merges or selection.features is view.features:
            return
        features, raster = _kept_of(selection)
        if bool((raster < 0).any()) or not torch.equal(features, view.features[0, raster]):
            raise ModelStateError(
                "A rule in the vision tower gives tokens that stay new features and does not say "
                "so; make its stage with merges=True."
            )

    def _after_projector(self, _: nn.Module, __: object, output: Tensor) -> Tensor | None:
        sizes, shape = self._sizes_of, output.shape
        output = output.flatten(0, -2)  # of which some projectors make a batch of one
        if self.selection is None or self._whole:
            self._kept = list(torch.split(self._in_raster(output, 0), sizes))
            self._slots = [torch.arange(n, device=output.device) for n in sizes]
        else:
            self._kept = list(torch.split(output, [len(slots) for slots in self._slots]))
        self._first = torch.stack([kept[0] for kept in self._kept]).detach()
        self._at = torch.stack([slots[0] for slots in self._slots])
        if self.selection is None or self._whole:
            return None
        filled = [
            output.new_zeros(n, output.shape[-1]).index_copy(0, slots, kept)
            for n, slots, kept in zip(sizes, self._slots, self._kept, strict=True)
        ]
        whole = torch.cat(filled)
        whole = whole if self._sequence is None else whole[self._sequence]
        return whole.view(*shape[:-2], *whole.shape)


def _kept_of(selection: TowerSelection) -> tuple[Tensor, Tensor]:
    """Features (k, C) and raster (k,) of what is kept of one image."""
    if selection.valid is None:
        return selection.features[0], selection.raster[0]
    valid = selection.valid[0]
    return selection.features[0, valid], selection.raster[0, valid]


def _slots(raster: Tensor, n: int) -> Tensor:
    """Where in its image every token kept comes: at its patch, or in place of one that goes.

    Args:
        raster: (k,) the patch that each stands for, -1 for none.
        n: Tokens of the image.

    Returns:
        (k,) different places; tokens that stand for no patch get the last of those that go.

    Raises:
        BudgetError: There are not so many.
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
