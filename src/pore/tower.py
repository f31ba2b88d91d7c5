"""Pruning in the vision tower: what a rule sees there, and the hooks that let it act.

What a rule keeps goes through the projector alone. The model counts image features against the
placeholders of the prompt, so behind the projector they are filled up with zeros to the number it
expects; the run drops the filling before the first decoder layer.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pore._private import CALL, HIDDEN, MASK, checkpointed
from pore.attention import cls_attention, received_attention, tap_attention, visible
from pore.changes import Changes
from pore.errors import BudgetError, InputError, UnsupportedModelError
from pore.families import Family
from pore.layout import Layout, Tiling, sources
from pore.precision import full_precision
from pore.selection import budget, check_finite


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
        order = (~mask).long().argsort(dim=1, stable=True)[:, :widest]
        features = self.features.gather(1, order[..., None].expand(-1, -1, self.features.shape[-1]))
        raster, valid = self.raster.gather(1, order), None
        if min(counts) < widest:
            valid = mask.gather(1, order)
        return TowerSelection(features, raster, valid, structure)


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


def _unless_whole(selection: TowerSelection, view: TowerView) -> TowerSelection:
    """A selection, or all there is where it is all that the prompt shows, as it came.

    Patches that show nothing but padding are projected then too: without them sums round otherwise.
    """
    valid = selection.valid
    if valid is None or view.tilings is None or selection.order is not None:
        return selection
    shown = view.shown
    if int(valid.sum()) != int(shown.sum()) or bool((selection.raster[valid] < 0).any()):
        return selection
    rows = torch.arange(len(valid), device=valid.device)[:, None].expand_as(valid)[valid]
    places = selection.raster[valid]
    same = torch.equal(selection.features[valid], view.features[rows, places])
    if not same or not bool(shown[rows, places].all()):
        return selection
    return TowerSelection(view.features, view.raster, None, selection.structure)


def even_shares(total: int, room: Sequence[int]) -> list[int]:
    """Share a number out as evenly as room allows, larger shares to the first.

    Args:
        total: What to share out, at most the sum of `room`.
        room: The most that each can take.

    Returns:
        The shares; they sum to `total`.
    """
    shares = [0] * len(room)
    left = total
    while left > 0:
        open_ = [i for i, most in enumerate(room) if shares[i] < most]
        each = max(left // len(open_), 1)
        for i in open_[:left]:
            more = min(each, room[i] - shares[i], left)
            shares[i] += more
            left -= more
    return shares


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


class TowerWatch:
    """What the vision tower of a model saw last, and what a stage made of it.

    `generate` runs the tower before the model, so what it saw is kept until the next time it runs.

    Args:
        changes: What takes the hooks off the model.
        model: The model.
        family: Its adapter.
        stage: The stage in the tower, or None only to watch.
        remember: Whether to hold on to what `encoded` gives.

    Attributes:
        pixels: (I, 3, H, W) pixel values of the latest call; None before the first.
        selection: What the stage's rule decided; None without a stage.
        projected: (I, k, D) what it kept, or all, behind the projector; None if not remembered.
        tilings: Of the images encoded last, in a family with tiles.
        tokens: Tokens behind the attention of every block, of the latest call; empty where blocks
            do not merge.
        has_cls: Whether the tower has a CLS token.
        notes: What the report should say of how the method acts in this tower.
        in_place: Whether what was kept lies behind the projector where it came from.
    """

    in_place: ClassVar[bool] = False

    def __init__(
        self,
        changes: Changes,
        model: nn.Module,
        family: Family,
        stage: TowerStage | None,
        remember: bool = False,
    ) -> None:
        self.pixels: Tensor | None = None
        self.selection: TowerSelection | None = None
        self.projected: Tensor | None = None
        self.tilings: tuple[Tiling, ...] | None = None
        self.tokens: list[int] = []
        self.has_cls = family.tower_has_cls(model)
        self.notes: list[str] = []
        self._model = model
        self._family = family
        self._stage = stage
        self._remember = remember
        self._features: Tensor
        self._attention: dict[int, Tensor] = {}
        self._queries: dict[int, Tensor] = {}
        self._keys: dict[int, Tensor] = {}
        self._states: Tensor
        self._real: Tensor | None = None
        self._block: Block | None = None
        self._patches = 0
        self._tokens = 0
        self._prompt: Tensor | None = None
        self._first: Tensor | None = None
        self._at: Tensor | None = None
        self._install(changes, model, family)

    def _install(self, changes: Changes, model: nn.Module, family: Family) -> None:
        tower, projector = family.tower(model), family.projector(model)
        features = family.token_features(model)
        watch_tiling(changes, model, family, self._note_tiling)
        if family.tiled_prompts:
            watch_prompt(changes, model, family, self._note_prompt)
        changes.before(tower, self._before_tower, with_kwargs=True)
        changes.after(projector, self._after_projector)
        if self._remember:  # before a stage chooses
            changes.before(features, self._note_features)
        stage = self._stage
        if stage is None:
            return
        layers, read = family.tower_layers(model), family.tower_read(model)
        wanted = list(stage.layers(read, len(layers)))
        attended = [family.tower_attended(model, layer) for layer in wanted]
        if not all(0 <= layer < len(layers) for layer in wanted):
            raise BudgetError(
                f"The method reads attention of tower layers {wanted}, but the tower has "
                f"{len(layers)} layers, of which the projector reads layer {read}."
            )
        changes.before(features, self._before_projector)
        if stage.merge is not None:
            changes.before(layers[0], self._before_layers, with_kwargs=True)
        changes.after(layers[read], self._after_layer)
        if attended != wanted:
            self.notes.append(
                f"Of tower layers {wanted} some attend in windows: in their stead the attention of "
                f"{attended} was read."
            )
        self._wanted = wanted = attended
        if wanted and not self.has_cls:
            self.notes.append(
                "The vision tower has no CLS token: in place of its attention, the mean attention "
                "that patches receive was used."
            )
        if wanted and family.merged:
            size = family.merge_size(model)
            self.notes.append(
                f"Every visual token is made of {size} x {size} patches: attention and keys were "
                "averaged over them."
            )
        merging = range(read + 1) if stage.merge is not None else ()
        for i in sorted({*wanted, *merging}):
            attention = family.tower_attention(layers[i])
            bias = self._sizes if stage.proportional and i in merging else None
            tap_attention(changes, attention, partial(self._observe, i), bias)
        for i in merging:
            changes.put(layers[i], "forward", partial(self._forward, layers, i, read + 1))

    def which(self, layout: Layout, embeds: Tensor) -> list[int] | None:
        """Which of the images that the tower saw last every image of a prefill is.

        Args:
            layout: The images of the prefill.
            embeds: (B, L, D) embeddings that enter the decoder.

        Returns:
            The number of each image in the tower's call; None where these are features that were
            made before.

        Raises:
            ScoreError: The features hold NaN or infinity, which equals nothing.
        """
        which = None if self._first is None else sources(layout.images, len(self._first))
        if self._first is None or which is None:
            return None
        check_finite(self._first, what="Visual tokens")
        at = torch.zeros_like(layout.rows) if self._at is None else self._at[which].to(layout.rows)
        found = embeds[layout.rows, layout.columns.gather(1, at[:, None])[:, 0]]
        return which if torch.equal(found, self._first[which].to(found)) else None

    def _note_tiling(self, tilings: Sequence[Tiling], videos: bool) -> None:
        if videos or any(tiling.blended for tiling in tilings):
            which = "a video" if videos else "an image as large as one of these"
            raise UnsupportedModelError(
                f"The tokens of {which} are not patches that went through {self._family.name}'s "
                "vision tower for images one by one; use a method that acts on the embeddings or "
                "in the decoder."
            )
        self.tilings = tuple(tilings)

    def tiles_of(self, image: int) -> slice:
        """Which of the I are the tiles of an encoded image."""
        if self.tilings is None:
            return slice(image, image + 1)
        first = sum(tiling.tiles for tiling in self.tilings[:image])
        return slice(first, first + self.tilings[image].tiles)

    def encoded(self, image: int) -> Encoded:
        """What was made of an encoded image; only where it was to be remembered."""
        tiles = self.tiles_of(image)
        assert self.projected is not None
        return Encoded(self._features[tiles], self.projected[tiles])

    def tokens_of(self, image: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the decoder gets of an encoded image.

        Returns:
            features (k, D) in order; places (k,): which of the image's visual tokens each is, -1
            for none; and slots (k,): in whose stead each comes, None where tiles are not apart.
        """
        assert self.selection is not None
        assert self.projected is not None
        tiles = self.tiles_of(image)
        raster, valid = self.selection.raster[tiles], self.selection.valid
        stays = torch.ones_like(raster, dtype=torch.bool) if valid is None else valid[tiles]
        features = self.projected[tiles][stays]
        if self.tilings is None:
            return features, raster[stays], None
        tiling = self.tilings[image]
        if tiling.apart:
            first = torch.arange(tiling.tiles, device=raster.device)[:, None] * tiling.patches
            places = torch.where(raster < 0, -1, first + raster)[stays]
            return features, places, (first + stays.cumsum(1) - 1)[stays]
        place = torch.full((tiling.tiles, tiling.patches), -1, dtype=torch.long)
        shown = torch.tensor(tiling.shown)
        place.view(-1)[shown] = torch.arange(len(shown))
        place = place.to(raster.device).gather(1, raster.clamp(min=0))
        place = place.masked_fill(raster < 0, -1)
        if self.selection.order is None:
            seen = (place >= 0) | (raster < 0)  # what shows padding alone is not in the prompt
            rank = torch.where(place < 0, len(shown), place)
        else:
            rank = self.selection.order[tiles]
            seen = rank >= 0
        seen = seen[stays]
        features, place, rank = features[seen], place[stays][seen], rank[stays][seen]
        if len(rank) > len(shown):
            raise BudgetError(
                f"{len(rank)} tokens are left of an image that the prompt has {len(shown)} for; "
                "keep fewer."
            )
        order = rank.argsort(stable=True)
        return features[order], place[order], None

    def _before_tower(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._stage is not None and self._stage.merge is not None:
            layers = self._family.tower_layers(self._model)
            if torch.is_grad_enabled() and any(checkpointed(layer) for layer in layers):
                raise UnsupportedModelError(
                    "Patches are merged from block to block of the vision tower, which gradient "
                    "checkpointing computes again one by one; turn gradient checkpointing off for "
                    "the vision tower."
                )
        self.pixels = self._family.pixels(args, kwargs)
        self._block = None
        self.tokens = []
        if self._family.tiled_prompts:
            if self._prompt is None:
                raise InputError(
                    f"Which tiles of {self._family.name} are of one image is read from the token "
                    "ids of the prompt, which did not come with these pixels; pass input_ids and "
                    "pixel_values together."
                )
            self.tilings = tuple(self._family.prompt_tilings(self._model, self._prompt))

    def _note_prompt(self, input_ids: Tensor | None) -> None:
        self._prompt = input_ids

    def _before_layers(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states: Tensor = args[0] if args else kwargs[HIDDEN]
        self._patches = states.shape[1] - self.has_cls

    def _observe(
        self, i: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, *_: object
    ) -> None:
        self._queries[i], self._keys[i] = query, key
        if i in self._wanted:
            self._real = visible(mask, len(query))
            read = cls_attention if self.has_cls else received_attention
            query, key = self._cls_first(query, key)
            self._attention[i] = read(query, key, scaling, self._real)

    def _cls_first(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Queries or keys (I, H, n, d) of the tower with the CLS token, if there is one, in front.

        Made where they are used, as what an observer makes has no graph.
        """
        if not self.has_cls or self._family.cls_first:
            return parts
        return tuple(part.roll(1, 2) for part in parts)

    # -- merging inside the blocks ----------------------------------------------------------------

    def _sizes(self) -> Tensor | None:
        """Logarithms of the sizes, once there are any: before, all tokens weigh alike."""
        return None if self._block is None else self._block.sizes.log()

    def _forward(
        self, layers: Any, i: int, count: int, hidden_states: Tensor, *args: Any, **kw: Any
    ) -> Tensor:
        """The block as transformers has it, with a merge between attention and MLP."""
        layer = layers[i]
        assert self._stage is not None
        assert self._stage.merge is not None
        mask = args[0] if args else kw.pop(MASK, None)
        normed = layer.layer_norm1(hidden_states)
        attended, _ = layer.self_attn(hidden_states=normed, attention_mask=mask, **kw)
        states = hidden_states + attended
        if self._block is None:
            images, n = states.shape[:2]
            places = torch.arange(n, device=states.device) - int(self.has_cls)
            sizes = torch.ones(images, n, device=states.device)
            raster = places.expand(images, -1)
        else:
            sizes, raster = self._block.sizes, self._block.raster
        block = Block(
            number=i,
            count=count,
            layers=len(layers),
            patches=self._patches,
            states=states,
            keys=self._cls_first(self._keys[i])[0],
            sizes=sizes,
            raster=raster,
            has_cls=self.has_cls,
        )
        with full_precision():
            merged = self._stage.merge(block)
        self.tokens.append(merged.states.shape[1])
        self._block = None if merged is block and self._block is None else merged
        return merged.states + layer.mlp(layer.layer_norm2(merged.states))  # type: ignore[no-any-return]

    # -- before and behind the projector ----------------------------------------------------------

    def _after_layer(self, _: nn.Module, __: object, output: Any) -> None:
        self._states = output if isinstance(output, Tensor) else output[0]

    def _before_projector(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        assert self._stage is not None
        features = _in_line(args[0])
        cls, groups = int(self.has_cls), None
        patches = self._states.shape[1] - cls
        if self._family.merged:
            groups = self._family.groups(self._model, patches).to(features.device)
        if features.shape[1] != (patches if groups is None else len(groups)):
            raise InputError(
                f"The projector gets {features.shape[1]} features of {self._states.shape[1]} "
                "tokens of the tower; pore takes the patches without the CLS token "
                "(vision_feature_select_strategy='default')."
            )
        if self.tilings is not None and sum(t.tiles for t in self.tilings) != len(features):
            raise InputError(
                f"{len(features)} tiles went through the vision tower, but the prompts have "
                f"{sum(t.tiles for t in self.tilings)}; build the inputs with the model's own "
                "processor."
            )
        self._tokens = features.shape[1] if self._stage.merge is None else self._patches
        if self._block is None:
            raster = torch.arange(features.shape[1], device=features.device)
            raster = raster.expand(len(features), -1)
        else:
            raster = self._block.raster[:, cls:]
        attention = [self._attention[i] for i in self._wanted]
        if groups is not None:
            attention = [weights[..., groups].mean(-1) for weights in attention]
        own = 0 if self._family.cls_first else -1
        view = TowerView(
            features=features,
            cls_feature=self._states[:, own] if cls and groups is None else None,
            cls_attention=torch.stack(attention) if attention else features.new_empty(0),
            queries=self._cls_first(*(self._queries[i] for i in self._wanted)),
            keys=self._cls_first(*(self._keys[i] for i in self._wanted)),
            raster=raster,
            tilings=self.tilings,
            groups=groups,
            real=self._real,
        )
        selection = self._choose(view)
        if self._block is None:  # of merged patches none is one of the prompt's
            selection = _unless_whole(selection, view)
        self.selection = selection
        self._attention, self._queries, self._keys, self._real = {}, {}, {}, None
        if selection.valid is None:
            return (selection.features, *args[1:])
        return (selection.features[selection.valid][None], *args[1:])

    def _check_graph(self, view: TowerView) -> None:
        """Refuse weights of merged features whose gradients reentrant checkpoints would lose."""
        assert self._stage is not None
        if not (self._stage.merges and view.features.requires_grad):
            return
        layers = self._family.tower_layers(self._model)
        for i, key in zip(self._wanted, view.keys, strict=True):
            trained = any(weight.requires_grad for weight in layers[i].parameters())
            if trained and checkpointed(layers[i]) and not key.requires_grad:
                raise UnsupportedModelError(
                    "Features are merged by what tower layers compute, which reentrant gradient "
                    "checkpointing keeps from the gradients; use use_reentrant=False."
                )

    def _choose(self, view: TowerView) -> TowerSelection:
        """What the stage's rule decides."""
        assert self._stage is not None
        check_finite(view.features, what="Visual tokens")
        self._check_graph(view)
        with full_precision():
            return self._stage.rule(view)

    def _note_features(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._features = _in_line(args[0])

    def _after_projector(self, _: nn.Module, __: object, output: Tensor) -> Tensor | None:
        assert self.pixels is not None
        output = _in_line(output)
        flat = output.dim() == 2
        valid = None if self.selection is None else self.selection.valid
        if valid is not None:
            output = output.new_zeros(*valid.shape, output.shape[-1]).masked_scatter(
                valid[..., None], output.view(-1, output.shape[-1])
            )
        elif flat:
            output = output.view(len(self.pixels), -1, output.shape[-1])
        if self._stage is not None or self._remember:
            self.projected = output
        if self.selection is not None:
            output = nn.functional.pad(output, (0, 0, 0, self._tokens - output.shape[1]))
        first = output[:, 0].detach()
        if self.tilings is not None:
            first = first[[self.tiles_of(image).start for image in range(len(self.tilings))]]
        self._first = first
        if self.selection is None:
            return None
        return output.flatten(0, 1) if flat else output


def _in_line(features: Tensor) -> Tensor:
    """Features (I, N, C) of tokens that may lie in rows, (I, height, width, C)."""
    return features.flatten(1, 2) if features.dim() == 4 else features


def watch_tiling(
    changes: Changes,
    model: nn.Module,
    family: Family,
    note: Callable[[Sequence[Tiling], bool], None],
) -> None:
    """Note how images and videos are tiled whenever a model encodes some.

    `generate` encodes them before it calls the model, and then forgets their sizes.

    Args:
        changes: What ends this.
        model: The model.
        family: Its adapter, which says by `encodes` and `encodes_videos` what there is to note.
        note: Called with the tilings, and whether they are of videos, before every encoding.
    """
    base: Any = family.base(model)
    encoding = False  # some models encode videos by the function that is for images

    def watch(name: str, tilings: Callable[..., Sequence[Tiling]], videos: bool) -> None:
        encode = getattr(base, name)

        @functools.wraps(encode)  # `generate` reads the signature
        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal encoding
            if encoding:
                return encode(*args, **kwargs)
            bound = inspect.signature(encode).bind_partial(*args, **kwargs)
            named = dict(bound.arguments)
            named.update(named.pop("kwargs", {}))
            note(tilings(model, named), videos)
            try:
                encoding = True
                return encode(*args, **kwargs)
            finally:
                encoding = False

        changes.put(base, name, watched)

    if family.encodes:
        watch("get_image_features", family.tilings, False)
    if family.encodes_videos:
        watch("get_video_features", family.video_tilings, True)


def watch_prompt(
    changes: Changes, model: nn.Module, family: Family, note: Callable[[Tensor | None], None]
) -> None:
    """Note the token ids of prompts before their images are encoded.

    `generate` encodes images before it calls the model, and without the token ids.

    Args:
        changes: What ends this.
        model: The model.
        family: Its adapter.
        note: Called with the ids (B, L), or None, before a prompt, and with None behind it.
    """
    base = family.base(model)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(family.inputs(model, args, kwargs).get("input_ids"))

    call = getattr(base, CALL)

    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        finally:
            note(None)

    changes.before(base, before, with_kwargs=True)
    changes.put(base, CALL, called)
    generate: Any = getattr(model, "generate", None)
    if generate is not None:

        @functools.wraps(generate)
        def watched(*args: Any, **kwargs: Any) -> Any:
            ids = args[0] if args else kwargs.get("inputs")
            try:
                note(kwargs.get("input_ids") if ids is None else ids)
                return generate(*args, **kwargs)
            finally:
                note(None)

        changes.put(model, "generate", watched)
