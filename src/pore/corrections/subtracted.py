"""A position bias that is subtracted, not divided out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pore.bias.position_bias import PositionBias
from pore.bias.where import Where
from pore.errors import ProfileError


@dataclass(frozen=True)
class Subtracted:
    """Ranks by A - c · m · P, with m the mean of A over the tokens of the image.

    PoRe models the bias as a factor, A = P · Â. If it is rather a sink that takes attention
    whatever is there, it is a term: A = Â + c · m · P. P has mean 1, so c is the share of the
    attention that counts as bias.

    Attributes:
        bias: The position bias P.
        share: c, from 0 to 1.

    Raises:
        ProfileError: `share` is not from 0 to 1.
    """

    bias: PositionBias
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ProfileError(f"share is from 0 to 1, not {self.share!r}.")

    @property
    def kind(self) -> str:
        """Its name in tables."""
        return f"{self.bias.kind}, subtracted"

    def correct(self, scores: Tensor, where: Where) -> Tensor:
        """(I, t) scores minus share · m · P, with m their mean over the image."""
        valid = where.layout.valid
        mean = scores.masked_fill(~valid, 0.0).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True)
        ones = scores.new_ones(()).expand_as(scores)
        return scores - self.share * mean / self.bias.correct(ones, where)

    def check(self, **conditions: Any) -> None:
        """Refuse other conditions than those of the measurement; see `PositionBias.check`."""
        self.bias.check(**conditions)
