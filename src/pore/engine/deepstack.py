"""DeepStack: features that the first decoder layers of Qwen3-VL add to the visual tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pore._compat.arguments import DEEPSTACK_WHAT, DEEPSTACK_WHERE
from pore.engine.calls import Calls
from pore.engine.forward import Visual
from pore.engine.setup import Setup
from pore.errors import UnsupportedModelError


def added_inside(
    setup: Setup,
    calls: Calls,
    process: Callable[..., Tensor],
    hidden: Tensor,
    visual: Tensor,
    embeds: Tensor,
) -> Tensor:
    """Called between two decoder layers: only the tokens that are left get features."""
    forward = calls.forward
    if forward.left.index is not None:
        _check(setup, forward.visual)
        visual, embeds = _left(visual, embeds, forward.left.index)
    return process(hidden, visual, embeds)


def added_to_prompt(
    setup: Setup, visual: Visual | None, kwargs: dict[str, Any], index: Tensor
) -> dict[str, Any]:
    """The decoder's arguments, with the features of the tokens that enter it alone.

    Args:
        setup: The method in the model.
        visual: The images of the call, or None.
        kwargs: The arguments.
        index: (B, M) which of the tokens that came enter.
    """
    if kwargs.get(DEEPSTACK_WHERE) is None:
        return kwargs
    _check(setup, visual)
    where = kwargs[DEEPSTACK_WHERE]
    left = [_left(where, one, index) for one in kwargs[DEEPSTACK_WHAT]]
    return {**kwargs, DEEPSTACK_WHERE: left[0][0], DEEPSTACK_WHAT: [one for _, one in left]}


def _check(setup: Setup, visual: Visual | None) -> None:
    if visual is not None and visual.misplaced:
        raise UnsupportedModelError(
            f"{setup.family.name} adds features to every visual token in its first decoder "
            f"layers, and {setup.method.name} has merged tokens before; give it a later layer, "
            "or use a method that only drops tokens."
        )


def _left(visual: Tensor, embeds: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to a shortened sequence.

    Args:
        visual: (B, L) bool, True at the visual tokens of the full sequence.
        embeds: (V, D) what is added to each of them, row by row.
        index: (B, M) the position in the full sequence of every token left.

    Returns:
        The same two for the tokens left.
    """
    index = index.to(visual.device)
    number = visual.flatten().cumsum(0).view(visual.shape) - 1
    left = visual.gather(1, index)
    return left, embeds[number.gather(1, index)[left].to(embeds.device)]
