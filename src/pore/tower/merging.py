"""Merging patches from block to block of the vision tower, as ToMe does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pore._compat.arguments import HIDDEN, MASK
from pore._compat.checkpointing import checkpointed
from pore.changes import Changes
from pore.errors import UnsupportedModelError
from pore.families.base import Family
from pore.hooks import tap_attention
from pore.tensors.precision import full_precision
from pore.tower.stages import Block, TowerStage


class BlockMerger:
    """Merges patches between attention and MLP of every block that the projector depends on.

    Args:
        changes: What undoes it in the model.
        model: The model.
        family: Its adapter.
        stage: The stage, which has a `merge`.

    Attributes:
        block: What is left after the latest block; None while nothing was merged.
        tokens: How many tokens were left after the attention of every block of this call.
        patches: How many patches an image had before the first block.
    """

    def __init__(
        self, changes: Changes, model: nn.Module, family: Family, stage: TowerStage
    ) -> None:
        assert stage.merge is not None
        self.block: Block | None = None
        self.tokens: list[int] = []
        self.patches = 0
        self._merge = stage.merge
        self._layers: Any = family.tower_layers(model)
        self._count = family.tower_read(model) + 1
        self._has_cls = family.tower_has_cls(model)
        self._cls_first = family.cls_first
        self._keys: dict[int, Tensor] = {}
        changes.before(family.tower(model), self._before_tower)
        changes.before(self._layers[0], self._before_first_block, with_kwargs=True)
        bias = self._log_sizes if stage.proportional else None
        for i, layer in enumerate(self._layers[: self._count]):
            tap_attention(changes, family.tower_attention(layer), partial(self._observe, i), bias)
            changes.put(layer, "forward", partial(self._forward, i))

    def _before_tower(self, *_: object) -> None:
        if torch.is_grad_enabled() and any(checkpointed(layer) for layer in self._layers):
            raise UnsupportedModelError(
                "Patches are merged from block to block of the vision tower, but gradient "
                "checkpointing computes blocks again one by one; turn gradient checkpointing off "
                "for the vision tower."
            )
        self.block = None
        self.tokens = []

    def _before_first_block(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        states: Tensor = args[0] if args else kwargs[HIDDEN]
        self.patches = states.shape[1] - self._has_cls

    def _observe(self, i: int, _: Tensor, key: Tensor, *__: object) -> None:
        self._keys[i] = key

    def _log_sizes(self) -> Tensor | None:
        """Added to the logits of keys, so that a token of size 2 counts twice; None: all are 1."""
        return None if self.block is None else self.block.sizes.log()

    def _forward(self, i: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run a block with its own modules, in the order of CLIP and SigLIP, merging in the middle.

        A hook cannot do this: the block adds the MLP's output to the states from before the merge.
        """
        layer = self._layers[i]
        mask = args[0] if args else kwargs.pop(MASK, None)
        normed = layer.layer_norm1(hidden_states)
        attended, _ = layer.self_attn(hidden_states=normed, attention_mask=mask, **kwargs)
        block = self._entering(i, hidden_states + attended)
        with full_precision():
            merged = self._merge(block)
        self.tokens.append(merged.states.shape[1])
        self.block = None if merged is block and self.block is None else merged
        mlp: Callable[..., Tensor] = layer.mlp
        return merged.states + mlp(layer.layer_norm2(merged.states))

    def _entering(self, i: int, states: Tensor) -> Block:
        """The tokens of a block after its attention, as the method sees them."""
        if self.block is None:
            images, n = states.shape[:2]
            places = torch.arange(n, device=states.device) - int(self._has_cls)
            sizes = torch.ones(images, n, device=states.device)
            raster = places.expand(images, -1)
        else:
            sizes, raster = self.block.sizes, self.block.raster
        keys = self._keys.pop(i)
        if self._has_cls and not self._cls_first:
            keys = keys.roll(1, 2)  # here, because tensors made in an observer have no graph
        return Block(
            number=i,
            count=self._count,
            layers=len(self._layers),
            patches=self.patches,
            states=states,
            keys=keys,
            sizes=sizes,
            raster=raster,
            has_cls=self._has_cls,
        )
