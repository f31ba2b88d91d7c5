"""Methods with several stages inside the decoder: their layers, their numbers and their biases."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from pore.engine.corrections import Correction, Reweight, correction_of
from pore.engine.pruner import Pruner
from pore.engine.readers import Reader
from pore.engine.stages import Selection, Stage, View
from pore.errors import BudgetError, ProfileMismatchError
from pore.families.base import Family
from pore.identity import at_hand
from pore.methods._checks import is_whole
from pore.tensors.selection import top_k

BY_A_BLIND_LAYER = (
    "one of its stages ranked by a layer that does not tell what is asked, and there the ranking "
    "without the bias is worse than chance"
)
"""Why a position bias harmed some methods of several stages (docs/corrections.md)."""


class StagedPruner(Pruner):
    """A method that drops visual tokens before several layers, by attention.

    A subclass is a frozen dataclass whose first field is `keep`; it defines `name`, `reader`,
    `remaining` and `score`, and either a field `layers` or `first_layers`. What it has to check
    besides its layers and biases, it checks in a `__post_init__` that calls the one here. If its
    stages need more than a reader and a rule, it changes the stages that `stages` returns here.

    Attributes:
        layers: The 0-based index of the first layer of every stage.
        reweight: The position bias P or another correction, or one for every stage, or None; for
            methods that take one.
    """

    layers: tuple[int, ...]
    reweight: Reweight | tuple[Reweight, ...] | None = None

    paper: ClassVar[str] = "unpublished"

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type] # its subclasses are dataclasses
            value = getattr(self, field.name)
            if isinstance(value, list):  # JSON has lists where a frozen dataclass has tuples
                object.__setattr__(self, field.name, tuple(value))
        check_layers(self.first_layers())
        _ = self.corrections

    @abstractmethod
    def reader(self) -> Reader | None:
        """What is read from attention and becomes `view.attention` in every stage; or None."""

    @abstractmethod
    def remaining(self, visual: int) -> Sequence[int]:
        """Tokens left after every stage, for an image that came with `visual` tokens.

        Raises:
            BudgetError: The image has fewer than should be kept.
        """

    @abstractmethod
    def score(self, stage: int, view: View) -> Tensor:
        """(I, t) scores of the visual tokens that are left; the highest are kept.

        Args:
            stage: Which stage, from 0.
            view: What the method can see; put attention that ranks through `view.corrected`.
        """

    def first_layers(self) -> tuple[int, ...]:
        """The first layer of every stage that sees fewer tokens."""
        return self.layers

    def must_meet(self, stage: int) -> bool:
        """Whether a stage must leave exactly its number of tokens.

        Other stages pass on what comes if that is less, as it can be after another method of a
        chain.
        """
        return stage == len(self.first_layers()) - 1

    @property
    def corrections(self) -> tuple[Correction | None, ...]:
        """The correction of every stage.

        Raises:
            ProfileMismatchError: There are several, but not one for each.
        """
        return correction_of_each(self.reweight, len(self.first_layers()))

    def stages(self) -> Sequence[Stage]:
        """One stage before each of the layers, ranked by the attention of the layer before."""
        return [
            Stage(
                layer,
                partial(self._select, number),
                self.reader(),
                correction=correction,
            )
            for number, (layer, correction) in enumerate(
                zip(self.first_layers(), self.corrections, strict=True)
            )
        ]

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse layers that the decoder does not have, and biases measured elsewhere."""
        check_stages(self.stages(), family, model)
        if self.harmed and any(one is not None for one in self.corrections):
            warnings.warn(
                f"A position bias made {self.name} worse where that was measured: {self.harmed}. "
                f"See whether it helps on your model, with questions whose answers you know: pore "
                f"evaluate --method {self.name} --reweight FILE (docs/corrections.md).",
                stacklevel=2,
            )

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image that enter every decoder layer."""
        found = [visual] * layers
        for layer, count in zip(self.first_layers(), self.remaining(visual), strict=True):
            found[layer:] = [count] * (layers - layer)
        return found

    def _select(self, stage: int, view: View) -> Selection:
        scores = self.score(stage, view)
        return Selection(top_k(scores, self._left(stage, view), view.layout.valid))

    def _left(self, stage: int, view: View) -> Tensor:
        """(I,) tokens of every image that a stage leaves."""
        valid = view.layout.valid
        left = view.budget(lambda visual: self.remaining(visual)[stage])
        counts = torch.tensor(left, device=valid.device)
        if not self.must_meet(stage):
            counts = torch.minimum(counts, valid.sum(-1))
        return counts


def check_layers(layers: tuple[int, ...]) -> None:
    """Refuse numbers that cannot be the first pruned layers of stages.

    Args:
        layers: 0-based indices.

    Raises:
        BudgetError: They are not ascending whole numbers from 1 on, or there are none.
    """
    whole = all(map(is_whole, layers))
    if not layers or not whole or layers[0] < 1 or list(layers) != sorted(set(layers)):
        raise BudgetError(
            f"layers={layers!r} must be the first pruned layer of each stage: whole numbers of at "
            "least 1, in ascending order."
        )


def correction_of_each(
    reweight: Reweight | tuple[Reweight, ...] | None, stages: int
) -> tuple[Correction | None, ...]:
    """The correction of every stage.

    Args:
        reweight: One for all, one for each, or None.
        stages: How many stages there are.

    Raises:
        ProfileMismatchError: There are several, but not one for each.
    """
    if not isinstance(reweight, tuple):
        return (correction_of(reweight),) * stages
    if len(reweight) != stages:
        raise ProfileMismatchError(
            f"reweight holds {len(reweight)} corrections for {stages} stages; give one for each, "
            "or a single one for all."
        )
    return tuple(map(correction_of, reweight))


def check_stages(
    stages: Sequence[Stage],
    family: Family,
    model: nn.Module,
) -> None:
    """Refuse layers that the decoder does not have, and biases measured elsewhere.

    Args:
        stages: Stages of which each looks at the layer before, or at its own.
        family: The model's adapter.
        model: The model.

    Raises:
        BudgetError: A stage reads the attention of a layer that the decoder does not have.
        ProfileMismatchError: A bias was measured elsewhere; the message names the differences.
    """
    count = len(family.layers(model))
    last = stages[-1]
    if (last.layer if last.ahead else last.layer - 1) >= count:
        raise BudgetError(
            f"Layer {last.layer} cannot be the first pruned layer of a decoder of {count} layers; "
            f"choose at most {count - 1 if last.ahead else count}."
        )
    for stage in stages:
        if stage.correction is not None:
            assert stage.reads_layer is not None
            measures = getattr(stage.attention, "measures", None)
            stage.correction.check(
                layer=stage.reads_layer + 1, normalize=measures, **at_hand(model)
            )
