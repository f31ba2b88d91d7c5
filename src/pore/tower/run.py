"""One pass of images through the vision tower: what is read there, and what a stage keeps.

Only the tokens that a stage keeps are projected. But the model compares the number of image
features with the placeholders of the prompt, so zeros are added after the projector: if a stage
keeps 128 of 576 tokens, 448 placeholders get zeros. The engine drops those before the first
decoder layer; `TowerRun.placed` says which placeholders hold a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pore._compat.checkpointing import checkpointed
from pore.changes import Changes
from pore.errors import BudgetError, InputError, UnsupportedModelError
from pore.families.base import Family
from pore.hooks import tap_attention
from pore.layout import Layout, Tiling, sources
from pore.tensors.precision import full_precision
from pore.tensors.selection import check_finite
from pore.tower.merging import BlockMerger
from pore.tower.stages import Encoded, TowerAttention, TowerSelection, TowerStage, TowerView
from pore.tower.watching import watch_prompt


@dataclass(frozen=True)
class Placed:
    """Which placeholders of a prefill hold a token that a stage in the tower kept.

    Attributes:
        keep: (I, t) bool, False at placeholders that got zeros.
        raster: (I, t) which of its image's visual tokens the token at a placeholder stands for, -1
            for none; arbitrary where not `keep`.
        features: (I, t, D) the features at the placeholders; None if the model has put them there
            already.
        structure: For every image, whether its tokens that show no patch (the end of a row) stay;
            None keeps them.
    """

    keep: Tensor
    raster: Tensor
    features: Tensor | None = None
    structure: Sequence[bool] | None = None


class TowerRun(ABC):
    """The last pass of images through a model's vision tower, and what a stage kept of it.

    `generate` runs the tower before it calls the model, so this is held until the tower runs again.
    Images are numbered as they went through the tower; `match` gives the number of an image of a
    prefill. Videos have a `TowerRun` of their own: they are its images.

    Args:
        changes: What takes the hooks off the model.
        model: The model.
        family: Its adapter; for videos, `Family.of_videos`.
        stage: The stage in the tower; None only watches.
        remember: Whether to keep what `encoded` returns.
        attend: The kinds of attention that are to be among it.
        active: Whether what goes through the tower now is of this kind, images or videos.

    Attributes:
        notes: What the report should say about the method in this tower.
    """

    def __init__(
        self,
        changes: Changes,
        model: nn.Module,
        family: Family,
        stage: TowerStage | None,
        remember: bool = False,
        attend: frozenset[TowerAttention] = frozenset(),
        active: Callable[[], bool] = lambda: True,
    ) -> None:
        self.notes: list[str] = []
        self._model = model
        self._family = family
        self._stage = stage
        self._remember = remember
        self._attend = attend
        self._active = active
        self._merger: BlockMerger | None = None
        self._tilings: tuple[Tiling, ...] | None = None
        self._prompt: Tensor | None = None
        self._mask: Any = None  # of the prompt, as it was given
        self._read: list[int] = []  # tower layers whose attention the stage reads
        self._attended = -1  # that whose attention is to be remembered, if any is
        self._features: Tensor  # all there are, where they are to be remembered
        # Of every image: the first token after the projector, and the placeholder that it fills.
        self._first: Tensor | None = None
        self._first_slot: Tensor | None = None
        self._install(changes)

    # -- what the engine asks ---------------------------------------------------------------------

    @property
    def block_tokens(self) -> list[int]:
        """How many tokens were left in every block; empty where blocks do not merge."""
        return [] if self._merger is None else self._merger.tokens

    def match(self, layout: Layout, embeds: Tensor) -> list[int] | None:
        """Find the images of a prefill among those that went through the tower last.

        They come in the same order, but samples may have been repeated, as for beam search. The
        prompt may also have come with features that were made earlier. The embeddings show it: an
        image that went through last begins with the first token that the projector made of it.

        Args:
            layout: The images of the prefill.
            embeds: (B, L, D) embeddings that enter the decoder.

        Returns:
            The number of each image; None if they are not those that went through last.

        Raises:
            ScoreError: The features hold NaN or infinity, so they cannot be compared.
        """
        numbers = None if self._first is None else sources(layout.images, len(self._first))
        if self._first is None or numbers is None:
            return None
        check_finite(self._first, what="Visual tokens")
        slots = torch.zeros_like(layout.rows)
        if self._first_slot is not None:
            slots = self._first_slot[numbers].to(slots)
        found = embeds[layout.rows, layout.columns.gather(1, slots[:, None])[:, 0]]
        return numbers if torch.equal(found, self._first[numbers].to(found)) else None

    def note_tilings(self, tilings: Sequence[Tiling]) -> None:
        """Take note of how the images that are about to go through the tower are cut into tiles."""
        self._tilings = tuple(tilings)

    @abstractmethod
    def encoded(self, image: int) -> Encoded:
        """What the tower made of an image, if it was to be remembered."""

    @abstractmethod
    def placed(self, layout: Layout, numbers: Sequence[int], features: Tensor) -> Placed:
        """Which placeholders hold the tokens that the stage kept.

        Args:
            layout: The images of the prefill.
            numbers: The number of each, see `match`.
            features: (I, t, D) what the model has put at the placeholders.
        """

    def pictures(self, numbers: Sequence[int]) -> Tensor:
        """(I, 3, H, W) pixel values of images by number; of each image, its first tile.

        Only a tower that takes images of one size has them.
        """
        raise NotImplementedError

    # -- hooks ------------------------------------------------------------------------------------

    @abstractmethod
    def _before_tower(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forget the last images."""

    @abstractmethod
    def _observe(
        self, i: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, *_: object
    ) -> None:
        """Take what the stage reads from the attention of tower layer i."""

    @abstractmethod
    def _note_features(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Remember all features, before a stage chooses."""

    @abstractmethod
    def _before_projector(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Let the stage choose what the projector gets."""

    @abstractmethod
    def _after_projector(self, _: nn.Module, __: object, output: Tensor) -> Tensor | None:
        """Add zeros to the projector's output, up to the number that the model expects."""

    def _install(self, changes: Changes) -> None:
        model, family, stage = self._model, self._family, self._stage
        features = family.token_features(model)
        if family.tiled_prompts or (stage is not None and stage.prompts):
            watch_prompt(changes, model, family, self._note_prompt)
        changes.before(family.tower(model), self._own(self._before_tower), with_kwargs=True)
        if self._remember:  # before a stage chooses
            changes.before(features, self._own(self._note_features))
        if family.pools_after is None:
            if stage is not None:
                changes.before(features, self._own(self._before_projector))
            changes.after(family.projector(model), self._own(self._after_projector))
        else:
            base, name = family.base(model), family.pools_after
            changes.put(base, name, partial(self._pool, getattr(base, name)))
        if stage is None and not self._attend:
            return
        layers, output = family.tower_layers(model), family.tower_read(model)
        asked = [] if stage is None else list(stage.layers(output, len(layers)))
        read = self._layers_read([*asked, *([output] if self._attend else [])], len(layers), output)
        self._read, self._attended = read[: len(asked)], read[-1] if self._attend else -1
        if stage is not None and stage.merge is not None:
            self._merger = BlockMerger(changes, model, family, stage)
        for i in sorted(set(read)):
            module, observe = family.tower_attention(layers[i]), partial(self._observe, i)
            tap_attention(changes, module, observe, wanted=self._active)

    def _own(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook that runs only while what it is for goes through the tower."""
        return lambda *args, **kwargs: hook(*args, **kwargs) if self._active() else None

    def _pool(self, pool: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
        """Make visual tokens of what the projector gave, as the model does; then choose some."""
        tokens = pool(features)
        if not self._active():
            return tokens
        if self._stage is not None:
            chosen = self._before_projector(self._model, (tokens,))
            tokens = tokens if chosen is None else chosen[0]
        filled = self._after_projector(self._model, None, tokens)
        return tokens if filled is None else filled

    def _layers_read(self, wanted: list[int], count: int, output: int) -> list[int]:
        """The tower layers that are read for those that are asked for.

        Args:
            wanted: The layers asked for.
            count: Layers of the tower.
            output: The layer that the projector reads.
        """
        model, family = self._model, self._family
        if not all(0 <= layer < count for layer in wanted):
            raise BudgetError(
                f"The method reads attention of tower layers {wanted}, but the tower has "
                f"{count} layers, and the projector reads the output of layer {output}."
            )
        attended = [family.tower_attended(model, layer) for layer in wanted]
        if attended != wanted:
            self.notes.append(
                f"Of tower layers {wanted} some attend in windows: in their stead the attention of "
                f"{attended} was read."
            )
        if wanted and not family.tower_has_cls(model):
            self.notes.append(
                "The vision tower has no CLS token: in place of its attention, the mean attention "
                "that patches receive was used."
            )
        if wanted and family.pools_after is not None:
            self.notes.append(
                "Visual tokens of a video are blended from patches after the projector: the method "
                "chose among the blended tokens, and attention and keys were blended alike."
            )
        elif wanted and family.merged:
            size = family.merge_size(model)
            self.notes.append(
                f"Every visual token is made of {size} x {size} patches: attention and keys were "
                "averaged over them."
            )
        return attended

    def _note_prompt(self, input_ids: Tensor | None, mask: Any) -> None:
        self._prompt, self._mask = input_ids, mask

    def _read_prompt_tilings(self) -> None:
        """Learn from the prompt which tiles belong to one image, if only the prompt says so."""
        if not self._family.tiled_prompts:
            return
        if self._prompt is None:
            raise InputError(
                f"In {self._family.name}, only the token ids of the prompt say which tiles belong "
                "to one image, and they did not come with these pixels; pass input_ids and "
                "pixel_values together."
            )
        self._tilings = tuple(self._family.prompt_tilings(self._model, self._prompt))

    # -- asking the stage -------------------------------------------------------------------------

    def _choose(self, view: TowerView) -> TowerSelection:
        """What the stage's rule decides."""
        assert self._stage is not None
        check_finite(view.features, what="Visual tokens")
        self._check_graph(view)
        with full_precision():
            return self._stage.rule(view)

    def _check_graph(self, view: TowerView) -> None:
        """Refuse merged features if reentrant checkpointing would lose their gradients."""
        assert self._stage is not None
        if not (self._stage.merges and view.features.requires_grad):
            return
        layers = self._family.tower_layers(self._model)
        for i, key in zip(self._read, view.keys, strict=True):
            trained = any(weight.requires_grad for weight in layers[i].parameters())
            if trained and checkpointed(layers[i]) and not key.requires_grad:
                raise UnsupportedModelError(
                    "Features are merged with weights that tower layers compute, and reentrant "
                    "gradient checkpointing loses their gradients; use use_reentrant=False."
                )
