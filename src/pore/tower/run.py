"""Pruning in the vision tower: what a rule sees there, and the hooks that let it act.

What a rule keeps goes through the projector alone. The model counts image features against the
placeholders of the prompt, so behind the projector they are filled up with zeros to the number it
expects; the run drops the filling before the first decoder layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pore._compat.arguments import HIDDEN, MASK
from pore._compat.checkpointing import checkpointed
from pore.changes import Changes
from pore.errors import BudgetError, InputError, UnsupportedModelError
from pore.families.base import Family
from pore.hooks import tap_attention
from pore.layout import Layout, Tiling, sources
from pore.tensors.attention import cls_attention, received_attention, visible
from pore.tensors.precision import full_precision
from pore.tensors.selection import check_finite
from pore.tower.stages import Block, Encoded, TowerSelection, TowerStage, TowerView
from pore.tower.watching import watch_prompt, watch_tiling


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


class TowerRun:
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
