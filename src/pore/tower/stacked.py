"""Pruning in vision towers that take images of one size side by side: CLIP, SigLIP and the like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pore._compat.arguments import IDS
from pore.changes import Changes
from pore.errors import InputError
from pore.layout import Image, Layout, Tiling
from pore.tensors.attention import cls_attention, mean_attention, received_attention, visible
from pore.tensors.pooling import Pooling
from pore.tensors.precision import scoring
from pore.tower.run import Placed, TowerRun
from pore.tower.stages import Encoded, Prompts, TowerAttention, TowerSelection, TowerView
from pore.tower.tiles import in_own_runs, in_prompt_order, tiles_of, whole_if_all_shown


class StackedTowerRun(TowerRun):
    """`TowerRun` of a tower that takes P images, tiles of images or frames, as (P, n, C)."""

    _pixels: Tensor | None = None  # (P, 3, H, W)
    _output: Tensor  # (P, n, C) of the layer that the projector reads
    _real: Tensor | None = None  # (P, n) bool, False at tokens that are padding; None: all are real
    _selection: TowerSelection | None = None
    _projected: Tensor  # (P, k, D) what was kept, or all tokens
    _remembered: dict[TowerAttention, Tensor]  # (P, H, N) each, what is to be remembered
    _pooled: Tensor | None = None  # (P, C) of a pooling head, likewise
    _scaling: float
    _pooling: Pooling | None = None  # of the pictures that went through last
    _count: int  # how many features of an image or tile the model expects

    def encoded(self, image: int) -> Encoded:
        """What the tower made of an image, if it was to be remembered."""
        tiles = tiles_of(self._tilings, image)
        attention = {kind: weights[tiles] for kind, weights in self._remembered.items()}
        pooled = None if self._pooled is None else self._pooled[tiles]
        return Encoded(self._features[tiles], self._projected[tiles], attention, pooled)

    def pictures(self, numbers: Sequence[int]) -> Tensor:
        """(I, 3, H, W) pixel values of images by number; of each image, its first tile."""
        assert self._pixels is not None
        return self._pixels[[tiles_of(self._tilings, number).start for number in numbers]]

    def placed(self, layout: Layout, numbers: Sequence[int], features: Tensor) -> Placed:
        """Which placeholders hold the tokens that the stage kept."""
        assert self._selection is not None
        selection, t = self._selection, layout.raster.shape[1]
        raster, valid = selection.raster, selection.valid
        stays = torch.ones_like(raster, dtype=torch.bool) if valid is None else valid
        raster, stays = raster.to(layout.raster.device), stays.to(layout.raster.device)
        if self._tilings is None:
            room = (0, t - raster.shape[1])
            keep = nn.functional.pad(stays[numbers], room) & layout.valid
            return Placed(keep, nn.functional.pad(raster[numbers], room))
        placed = Placed(
            torch.zeros_like(layout.valid),
            torch.zeros_like(layout.raster),
            None if all(self._tilings[number].apart for number in numbers) else features.clone(),
            structure := [],
        )
        for i, (image, number) in enumerate(zip(layout.images, numbers, strict=True)):
            tiles = tiles_of(self._tilings, number)
            structure.append(self._place(placed, i, image, number, raster[tiles], stays[tiles]))
        return placed

    def _place(
        self, placed: Placed, i: int, image: Image, number: int, raster: Tensor, stays: Tensor
    ) -> bool:
        """Place the tokens of an image in tiles; tells if the structure between them stays."""
        assert self._selection is not None
        assert self._tilings is not None
        tiling, tiles = self._tilings[number], tiles_of(self._tilings, number)
        if tiling.apart:
            slots, places = in_own_runs(tiling, raster, stays)
            placed.keep[i, slots], placed.raster[i, slots] = True, places
            return True
        rank = self._selection.order
        rank = None if rank is None else rank[tiles].to(raster.device)
        chosen, places = in_prompt_order(tiling, raster, stays, rank)
        # Rows keep their end tokens if every token stays at the placeholder of its patch.
        rows = rank is None and self._selection.structure and len(image.structure) > 0
        rows = rows and bool((places >= 0).all())
        slots = places if rows else torch.arange(len(places), device=places.device)
        placed.keep[i, slots], placed.raster[i, slots] = True, places
        assert placed.features is not None
        found = self._projected[tiles].flatten(0, 1)[chosen.to(self._projected.device)]
        placed.features[i, slots.to(placed.features.device)] = found.to(placed.features)
        return rows

    # -- hooks ------------------------------------------------------------------------------------

    def _install(self, changes: Changes) -> None:
        super()._install(changes)
        self._has_cls = self._family.tower_has_cls(self._model)
        self._remembered = {}
        self._queries: dict[int, Tensor] = {}
        self._keys: dict[int, Tensor] = {}
        if self._stage is not None or self._attend or self._family.pools_after is not None:
            layers = self._family.tower_layers(self._model)
            read = layers[self._family.tower_read(self._model)]
            changes.after(read, self._own(self._after_layer))

    def _before_tower(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pixels = self._family.pixels(args, kwargs)
        self._read_prompt_tilings()

    def _observe(
        self, i: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, *_: object
    ) -> None:
        self._queries[i], self._keys[i] = query, key
        self._real, self._scaling = visible(mask, len(query)), scaling

    def _cls_first(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Queries or keys (P, H, n, d) of the tower with the CLS token, if there is one, in front.

        Called only when a rule gets them, because tensors made in an observer have no graph.
        """
        if not self._has_cls or self._family.cls_first:
            return parts
        return tuple(part.roll(1, 2) for part in parts)

    def _after_layer(self, _: nn.Module, __: object, output: Any) -> None:
        self._output = output if isinstance(output, Tensor) else output[0]
        self._pooling = None
        if self._family.merged:
            patches = self._output.shape[1] - int(self._has_cls)
            pooling = self._family.pooling(self._model, patches)
            self._pooling = pooling.to(self._output.device)

    def _note_features(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._features = features = _in_line(args[0])
        if self._family.pools_after is not None:
            assert self._pooling is not None
            self._features = self._pooling.means(features, 1)
        head = self._family.pooling_head(self._model) if "pooled" in self._attend else None
        kinds = self._attend if head is None else self._attend - {"pooled"}
        self._remembered = {kind: self._attention(self._attended, kind) for kind in kinds}
        if head is not None:
            with scoring():
                self._pooled, weights = head(self._output)
            self._remembered["pooled"] = self._by_token(weights[:, None])
        if self._stage is None:
            self._forget_layers()

    def _before_projector(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        features = _in_line(args[0])
        view = self._view(features[:, 1:] if self._family.keeps_cls else features)
        selection = self._choose(view)
        merged = self._merger is not None and self._merger.block is not None
        if not merged:  # the prompt shows patches, none of which a merged one is
            selection = whole_if_all_shown(selection, view)
        if self._family.keeps_cls:
            selection = _with_cls(selection, features, view)
        self._selection = selection
        self._count = features.shape[1] if self._merger is None else self._merger.patches
        self._forget_layers()
        if selection.valid is None:
            return (selection.features, *args[1:])
        return (selection.features[selection.valid][None], *args[1:])

    def _forget_layers(self) -> None:
        self._queries, self._keys, self._real = {}, {}, None

    def _attention(self, i: int, kind: TowerAttention, cls: bool | None = None) -> Tensor:
        """(P, H, N) attention in layer i to the visual tokens, the mean of that to their patches.

        Args:
            i: The layer.
            kind: Which attention.
            cls: Whether the N count the CLS token; None counts it where it is a visual token.
        """
        own = self._has_cls and not (self._family.keeps_cls if cls is None else cls)
        query, key = self._cls_first(self._queries[i], self._keys[i])
        pooling = self._pooling
        with scoring():
            if kind in ("mean", "pooled"):
                query, key = query[:, :, int(self._has_cls) :], key[:, :, int(own) :]
                key = key if pooling is None else pooling.means(key, 2)
                return mean_attention(query, key, self._scaling)
            read = cls_attention if self._has_cls and kind == "cls" else received_attention
            weights = read(query, key, self._scaling, self._real)[..., int(own) :]
            return self._by_token(weights)

    def _by_token(self, weights: Tensor) -> Tensor:
        """(P, h, N) weights of the visual tokens, the mean of those (P, h, n) of their patches."""
        return weights if self._pooling is None else self._pooling.means(weights, 2)

    def _view(self, features: Tensor) -> TowerView:
        """What the stage's rule sees, of features (P, N, C) that the projector would get."""
        cls, pooling, keeps = int(self._has_cls), self._pooling, self._family.keeps_cls
        patches = self._output.shape[1] - cls
        self._check_counts(features, patches if pooling is None else len(pooling.groups))
        attention = [self._attention(i, "cls", cls=False) for i in self._read]
        block = None if self._merger is None else self._merger.block
        if block is None:
            raster = torch.arange(features.shape[1], device=features.device)
            raster = raster.expand(len(features), -1)
        else:
            raster = block.raster[:, cls:]
        own = 0 if self._family.cls_first else -1
        return TowerView(
            features=features,
            cls_feature=self._output[:, own] if cls and pooling is None and not keeps else None,
            cls_attention=torch.stack(attention) if attention else features.new_empty(0),
            queries=self._cls_first(*(self._queries[i] for i in self._read)),
            keys=self._cls_first(*(self._keys[i] for i in self._read)),
            raster=raster,
            tilings=_of_patches(self._tilings, patches) if keeps else self._tilings,
            pooling=pooling,
            real=self._real,
            beside=int(keeps),
            prompts=self._prompts(len(features)),
        )

    def _prompts(self, pictures: int) -> Prompts | None:
        """The prompts that the P pictures came with, if the stage reads them."""
        if self._stage is None or not self._stage.prompts:
            return None
        if self._prompt is None:
            raise InputError(
                "The method reads the prompt while its images go through the vision tower; pass "
                "input_ids and pixel_values together."
            )
        inputs = {IDS: self._prompt, "tilings": self._tilings}
        images = self._family.still_images(self._model, inputs)
        tiles = [1] * len(images) if self._tilings is None else [t.tiles for t in self._tilings]
        if len(tiles) != len(images) or sum(tiles) != pictures:
            raise InputError(
                f"{pictures} pictures went through the vision tower, but the prompts have "
                f"{len(images)} images; build the inputs with the model's own processor."
            )
        text = torch.ones_like(self._prompt, dtype=torch.bool)
        if isinstance(self._mask, Tensor) and self._mask.shape == text.shape:
            text = self._mask.to(text.device).bool().clone()
        for image in images:
            text[image.row, [*image.columns, *image.structure]] = False
        return Prompts(
            rows=[image.row for image, n in zip(images, tiles, strict=True) for _ in range(n)],
            texts=[ids[said].tolist() for ids, said in zip(self._prompt, text, strict=True)],
        )

    def _check_counts(self, features: Tensor, expected: int) -> None:
        """Refuse features that are not one for every visual token of every tile."""
        if features.shape[1] != expected:
            raise InputError(
                f"The projector gets {features.shape[1]} features of {self._output.shape[1]} "
                "tokens of the tower; pore takes the patches without the CLS token "
                "(vision_feature_select_strategy='default')."
            )
        if self._tilings is not None and sum(t.tiles for t in self._tilings) != len(features):
            raise InputError(
                f"{len(features)} tiles went through the vision tower, but the prompts have "
                f"{sum(t.tiles for t in self._tilings)}; build the inputs with the model's own "
                "processor."
            )

    def _after_projector(self, _: nn.Module, __: object, output: Tensor) -> Tensor | None:
        assert self._pixels is not None
        output = _in_line(output)
        flat = output.dim() == 2
        valid = None if self._selection is None else self._selection.valid
        if valid is not None:
            output = output.new_zeros(*valid.shape, output.shape[-1]).masked_scatter(
                valid[..., None], output.view(-1, output.shape[-1])
            )
        elif flat:
            output = output.view(len(self._pixels), -1, output.shape[-1])
        if self._stage is not None or self._remember:
            self._projected = output
        if self._selection is not None:
            output = nn.functional.pad(output, (0, 0, 0, self._count - output.shape[1]))
        first = output[:, 0].detach()
        if self._tilings is not None:
            first = first[[tiles_of(self._tilings, i).start for i in range(len(self._tilings))]]
        self._first = first
        if self._selection is None:
            return None
        return output.flatten(0, 1) if flat else output


def _with_cls(selection: TowerSelection, features: Tensor, view: TowerView) -> TowerSelection:
    """A selection among patches as one among all visual tokens, of which the first is CLS.

    Args:
        selection: What the rule decided.
        features: (P, N + 1, C) of CLS and the patches.
        view: What the rule saw.
    """
    raster, valid = selection.raster, selection.valid
    raster = nn.functional.pad(torch.where(raster < 0, -1, raster + 1), (1, 0), value=0)
    if valid is not None:
        valid = nn.functional.pad(valid, (1, 0), value=True)
    if selection.features is not view.features:
        features = torch.cat([features[:, :1], selection.features], 1)
    return TowerSelection(features, raster, valid)


def _of_patches(tilings: Sequence[Tiling] | None, patches: int) -> tuple[Tiling, ...]:
    """The tilings of videos whose frames have a CLS token, as if they had none."""
    counts = [tiling.tiles for tiling in tilings or ()]
    return tuple(
        Tiling(frames, None, patches, tuple(range(frames * patches)), of_frames=True)
        for frames in counts
    )


def _in_line(features: Tensor) -> Tensor:
    """Features (P, N, C) of tokens that may lie in rows, (P, height, width, C)."""
    return features.flatten(1, 2) if features.dim() == 4 else features
