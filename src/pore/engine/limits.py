"""What of a method a family or a model does not take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from pore.errors import BudgetError, InputError, UnsupportedModelError
from pore.families.base import Family
from pore.layout import Layout

if TYPE_CHECKING:
    from pore.engine.pruner import Pruner


def check_query(layout: Layout) -> None:
    """Refuse a prompt that ends with a visual token, for methods in the decoder or of a question.

    No text looks at the image there, and the answer follows a token that may be dropped on the way.

    Args:
        layout: Where the visual tokens lie.

    Raises:
        InputError: The last token of a sample with images is visual.
    """
    last = layout.last[layout.rows, None]
    at_end = ((layout.columns == last) & layout.valid).any(-1)
    if bool(at_end.any()):
        row = layout.images[int(at_end.nonzero()[0])].row
        raise InputError(
            f"The prompt of sample {row} ends with a visual token, so no text token looks at "
            "the image, and the answer would follow a token that may be dropped; put the question "
            "after the image, and pass both in one piece."
        )


def check_layer(layer: int, family: Family, model: nn.Module, first: int = 1) -> None:
    """Refuse a pruned layer that the decoder does not have.

    Args:
        layer: 0-based index of the first pruned layer; scores come from the layer before.
        family: The model's adapter.
        model: The model.
        first: The earliest layer allowed: 1, or 0 for methods that need no layer before.

    Raises:
        BudgetError: `layer` is not between `first` and the number of layers - 1.
    """
    count = len(family.layers(model))
    if isinstance(layer, bool) or not isinstance(layer, int) or not first <= layer < count:
        why = " (scores come from the layer before it)" if first == 1 else ""
        raise BudgetError(
            f"layer={layer!r} cannot be the first pruned layer of a decoder of {count} layers; "
            f"choose {first} to {count - 1}{why}."
        )


def check_limits(pruner: Pruner, family: Family) -> None:
    """Refuse a method that a family does not take with its settings.

    Args:
        pruner: The method.
        family: The adapter.

    Raises:
        UnsupportedModelError: The family does not take it; the message says why.
    """
    for limit in pruner.limits(family):
        if limit.unless is None:
            raise UnsupportedModelError(
                f"{pruner.name} with these settings cannot be used in {family.name}: {limit.reason}"
            )
