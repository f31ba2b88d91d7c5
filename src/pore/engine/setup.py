"""What is known about a method and a model from entering a block until leaving it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pore.engine.limits import (
    check_before_mlp,
    check_limits,
    check_proportional,
    check_recurrent,
    check_sharing,
    reads_tower,
    tower_stage,
)
from pore.engine.masks import window_of
from pore.engine.stages import Method, Stage
from pore.families.base import Family
from pore.tower.stages import TowerStage

_checks: list[Callable[[nn.Module], None]] = []


def before_entering(check: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """Register a check of every model before it is pruned, for rooms above this one.

    Args:
        check: Called with the model, which fits the method; raises if it must not be pruned.

    Returns:
        The same, so that this is a decorator.
    """
    _checks.append(check)
    return check


@dataclass(frozen=True)
class Setup:
    """A method in a model: all that the hooks of a block read and none of them changes.

    Attributes:
        method: The method with its settings.
        model: The model, out of any wrapping.
        family: Its adapter.
        layers: The decoder's layers.
        config: The decoder's config.
        entry: The stages that act on the embeddings, before the first layer.
        inner: The stages that act in the decoder, by layer.
        tower: The stage in the vision tower, or None.
        reads_tower: Whether a stage reads what goes through the vision tower.
        dense: Whether a stage before the first layer, or in the tower, numbers positions anew.
        windows: The sliding window of every layer; None for a layer that looks at all tokens.
        sources: For a layer that looks at keys of an earlier layer (Gemma 3n), which one that is.
        generator: Random generator for methods that draw.
    """

    method: Method
    model: nn.Module
    family: Family
    layers: Sequence[nn.Module]
    config: Any
    entry: tuple[Stage, ...]
    inner: tuple[Stage, ...]
    tower: TowerStage | None
    reads_tower: bool
    dense: bool
    windows: tuple[int | None, ...]
    sources: dict[int, int]
    generator: torch.Generator

    @classmethod
    def of(cls, method: Method, model: nn.Module, family: Family) -> Setup:
        """The setup of a method in a model.

        Raises:
            PoreError: The method's settings do not fit the model.
        """
        check_limits(method, family)
        method.check(model, family)
        for check in _checks:
            check(model)
        layers = family.layers(model)
        config: Any = family.decoder(model).config
        every = method.stages_in(len(layers))
        stages = [stage for stage in every if isinstance(stage, Stage)]
        entry = tuple(stage for stage in stages if stage.layer == 0)
        inner = tuple(stage for stage in stages if stage.layer > 0)
        sources = {}
        for i in range(len(layers)) if family.shares_keys else ():
            source = family.source(model, i)
            if source is not None:
                sources[i] = source
        attending = [i for i, layer in enumerate(layers) if not family.recurrent(layer)]
        reading = [stage for stage in entry if stage.attention is not None]
        check_recurrent(method, [*reading, *inner], attending)
        check_sharing(method, inner, sources)
        check_proportional(method, stages, config)
        check_before_mlp(method, inner, layers)
        return cls(
            method=method,
            model=model,
            family=family,
            layers=layers,
            config=config,
            entry=entry,
            inner=inner,
            tower=tower_stage(every),
            reads_tower=reads_tower(every),
            dense=len(stages) < len(every) or any(stage.dense for stage in entry),
            windows=tuple(window_of(config, i) for i in range(len(layers))),
            sources=sources,
            generator=torch.Generator().manual_seed(int(getattr(method, "seed", 0))),
        )

    @property
    def first(self) -> int:
        """The first layer that may get other tokens, positions or masks than the model passes."""
        if (self.shortens_prompt and not self.dense) or self.forgets:
            return 0
        return min((stage.layer for stage in self.inner), default=len(self.layers))

    @property
    def forgets(self) -> bool:
        """Whether later tokens see in no layer what a stage in the decoder has dropped."""
        return any(stage.forgets for stage in self.inner)

    @property
    def shortens_prompt(self) -> bool:
        """Whether tokens are dropped before the first layer."""
        return self.tower is not None or bool(self.entry)

    @property
    def narrowest(self) -> int | None:
        """The smallest sliding window of a layer; None where there is none."""
        return min((window for window in self.windows if window is not None), default=None)

    def renumbers(self, stage: Stage) -> bool:
        """Whether positions are numbered anew after a stage in the decoder.

        Positions on several axes (Qwen-VL) cannot be.
        """
        return stage.dense and not self.family.mrope
