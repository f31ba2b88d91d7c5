"""What every decoder layer gets."""

from __future__ import annotations

from torch import Tensor


def deepstack_of(visual: Tensor, embeds: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """What DeepStack adds to a shortened sequence.

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
