"""What methods of several stages inside the decoder share: their layers and their biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from pore.errors import BudgetError, ProfileMismatchError
from pore.families.base import Family
from pore.identity import at_hand

if TYPE_CHECKING:
    from pore.bias.position_bias import PositionBias
    from pore.engine.stages import Stage


def freeze(settings: Any, *names: str) -> None:
    """Turn lists, as JSON has them, into the tuples that a frozen dataclass should hold."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, list):
            object.__setattr__(settings, name, tuple(value))


def check_layers(layers: tuple[int, ...]) -> None:
    """Refuse what are no first pruned layers of stages.

    Args:
        layers: 0-based indices.

    Raises:
        BudgetError: They are not ascending whole numbers from 1 on, or there is none.
    """
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in layers)
    if not layers or not whole or layers[0] < 1 or list(layers) != sorted(set(layers)):
        raise BudgetError(
            f"layers={layers!r} are no stages; give the first pruned layer of each, whole numbers "
            "of at least 1 in ascending order."
        )


def bias_of_each(
    reweight: PositionBias | tuple[PositionBias, ...] | None, stages: int
) -> tuple[PositionBias | None, ...]:
    """The position bias of every stage.

    Args:
        reweight: One for all, one for each, or None.
        stages: How many stages there are.

    Raises:
        ProfileMismatchError: There are several, but not one for each.
    """
    if not isinstance(reweight, tuple):
        return (reweight,) * stages
    if len(reweight) != stages:
        raise ProfileMismatchError(
            f"reweight holds {len(reweight)} position biases for {stages} stages; give one for "
            "each, or a single one for all."
        )
    return reweight


def check_stages(
    stages: Sequence[Stage],
    biases: Sequence[PositionBias | None],
    family: Family,
    model: nn.Module,
) -> None:
    """Refuse layers that the decoder lacks, and biases measured under other conditions.

    Args:
        stages: Stages that read attention.
        biases: The position bias of each, or None.
        family: The model's adapter.
        model: The model.

    Raises:
        BudgetError: The attention of a stage is of a layer that the decoder does not have.
        ProfileMismatchError: A bias was measured elsewhere; the message names the differences.
    """
    count = len(family.layers(model))
    last = stages[-1]
    assert last.reads_layer is not None
    if last.reads_layer >= count:
        raise BudgetError(
            f"Layer {last.layer} cannot be the first pruned layer of a decoder of {count} layers; "
            f"choose at most {count - 1 if last.ahead else count}."
        )
    for stage, bias in zip(stages, biases, strict=True):
        if bias is not None:
            assert stage.reads_layer is not None
            measures = getattr(stage.attention, "measures", None)
            bias.check(layer=stage.reads_layer + 1, normalize=measures, **at_hand(model))
