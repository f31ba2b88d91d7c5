"""Pruning in the vision tower: what a rule sees there, and the hooks that let it act.

What a rule keeps goes through the projector alone. The model counts image features against the
placeholders of the prompt, so behind the projector they are filled up with zeros to the number it
expects; the run drops the filling before the first decoder layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pore.attention import AttentionTap, cls_attention
from pore.errors import BudgetError, InputError
from pore.families import Family
from pore.layout import Layout, sources
from pore.selection import budget


@dataclass(frozen=True)
class TowerView:
    """What the rule of a stage in the vision tower sees, of all images of a call.

    Attributes:
        features: (I, N, C) the patch features that the projector would get.
        cls_feature: (I, C) the CLS token's feature of the same layer.
        cls_attention: (S, I, H, N) attention of the CLS token to the patches in the layers asked
            for, after a softmax over CLS and patches; at least float32.
        keys: (I, N + 1, d) keys of the last of these layers, averaged over heads, CLS first.
    """

    features: Tensor
    cls_feature: Tensor
    cls_attention: Tensor
    keys: Tensor

    def budget(self, keep: int | float) -> int:
        """The number of tokens that `keep` means for every image.

        Raises:
            BudgetError: The images have fewer.
        """
        return budget(keep, self.features.shape[1])


@dataclass(frozen=True)
class TowerSelection:
    """What a stage in the vision tower decides.

    Attributes:
        features: (I, k, C) the features that go on to the projector.
        raster: (I, k) the patch that each stands for; of merged ones the patch they are merged
            into, and -1 for the CLS token.
    """

    features: Tensor
    raster: Tensor


@dataclass(frozen=True)
class TowerStage:
    """One place in the vision tower where a method drops or merges patches.

    Only what it keeps is projected, and the decoder never sees the rest: positions are numbered
    anew, as in the authors' code of the methods that act here.

    Attributes:
        rule: Decides what goes on to the projector.
        start: First layer whose CLS attention the rule reads, of those up to the one whose output
            the projector reads; -1 is that one alone.
    """

    rule: Callable[[TowerView], TowerSelection]
    start: int = -1


class TowerWatch:
    """What the vision tower of a model saw last, and what a stage made of it.

    `generate` runs the tower before the model, so what it saw is kept until the next time it runs.

    Args:
        model: The model.
        family: Its adapter.
        stage: The stage in the tower, or None only to watch.

    Attributes:
        pixels: (I, 3, H, W) pixel values of the latest call; None before the first.
        raster: (I, k) the patch that each projected feature stands for; None without a stage.
    """

    def __init__(self, model: nn.Module, family: Family, stage: TowerStage | None) -> None:
        self.pixels: Tensor | None = None
        self.raster: Tensor | None = None
        self._family = family
        self._stage = stage
        self._attention: list[Tensor] = []
        self._keys: Tensor
        self._states: Tensor
        self._patches = 0
        self._first: Tensor | None = None
        self._hooks: list[Any] = []
        self._taps: list[AttentionTap] = []
        try:
            self._install(model, family)
        except BaseException:
            self.remove()
            raise

    def _install(self, model: nn.Module, family: Family) -> None:
        tower, projector = family.tower(model), family.projector(model)
        self._hooks.append(tower.register_forward_pre_hook(self._before_tower, with_kwargs=True))
        self._hooks.append(projector.register_forward_hook(self._after_projector))
        if self._stage is None:
            return
        layers = family.tower_layers(model)
        read = layers[self._stage.start :]
        if not read:
            raise BudgetError(
                f"The projector reads layer {len(layers) - 1} of the vision tower, so layers "
                f"from {self._stage.start} on say nothing of what it gets."
            )
        self._hooks.append(projector.register_forward_pre_hook(self._before_projector))
        self._hooks.append(layers[-1].register_forward_hook(self._after_layer))
        for layer in read:
            self._taps.append(AttentionTap(family.attention(layer), self._observe))

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in (*self._hooks, *self._taps):
            hook.remove()

    def which(self, layout: Layout, embeds: Tensor) -> list[int] | None:
        """Which of the images that the tower saw last every image of a prefill is.

        Args:
            layout: The images of the prefill.
            embeds: (B, L, D) embeddings that enter the decoder.

        Returns:
            The number of each image in the tower's call; None where these are features that were
            made before.
        """
        which = None if self._first is None else sources(layout.images, len(self._first))
        if self._first is None or which is None:
            return None
        found = embeds[layout.rows, layout.columns[:, 0]]
        return which if torch.equal(found, self._first[which].to(found)) else None

    def _before_tower(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.pixels = self._family.pixels(args, kwargs)
        self._attention.clear()

    def _observe(
        self, query: Tensor, key: Tensor, _: Tensor | None, scaling: float, __: float | None
    ) -> None:
        self._attention.append(cls_attention(query, key, scaling))
        self._keys = key.mean(1)

    def _after_layer(self, _: nn.Module, __: object, output: Any) -> None:
        self._states = output if isinstance(output, Tensor) else output[0]

    def _before_projector(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self._stage is not None
        features: Tensor = args[0]
        if features.shape[1] != self._states.shape[1] - 1:
            raise InputError(
                f"The projector gets {features.shape[1]} features of {self._states.shape[1]} "
                "tokens of the tower; pore takes vision_feature_select_strategy='default' here."
            )
        view = TowerView(
            features=features,
            cls_feature=self._states[:, 0],
            cls_attention=torch.stack(self._attention),
            keys=self._keys,
        )
        selection = self._stage.rule(view)
        self.raster, self._patches = selection.raster, features.shape[1]
        return (selection.features, *args[1:])

    def _after_projector(self, _: nn.Module, __: object, output: Tensor) -> Tensor | None:
        self._first = output[:, 0].detach()
        if self._stage is None:
            return None
        return nn.functional.pad(output, (0, 0, 0, self._patches - output.shape[1]))
