"""The attention of a token that cannot see the question, as a prior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pore.bias.where import Where
from pore.engine.corrections import AttentionCorrection
from pore.engine.readers import LayerAttention, NullToken
from pore.errors import ScoreError

_LEAST = 1e-10  # as in the authors' code: added to shares before they are divided


@dataclass(frozen=True)
class NullTokenPrior(AttentionCorrection):
    """Compares the attention with that of the token after the image, which sees no question.

    That token, the null token, is in the same prompt and looks at the same image from nearly the
    same place. Its attention does not depend on the question (PriorTR, arXiv 2606.24156). With P
    for a visual token's share of the scores, and Q for its share of the null token's attention,
    tokens are ranked by P · ln(P / Q), or by P / Q. Nothing is calibrated.

        pruner = pore.FastV(keep=128, reweight=pore.corrections.NullTokenPrior())

    Attributes:
        by: "log ratio" for P · ln(P / Q), as published; "ratio" for P / Q.
        offset: How many text tokens after the image come before the null token.

    Raises:
        ScoreError: `by` is neither.
    """

    by: Literal["log ratio", "ratio"] = "log ratio"
    offset: int = 0

    def __post_init__(self) -> None:
        if self.by not in ("log ratio", "ratio"):
            raise ScoreError(f"by is 'log ratio' or 'ratio', not {self.by!r}.")

    @property
    def kind(self) -> str:  # type: ignore[override] # of every instance
        """Its name in tables."""
        return f"null token, {self.by}"

    def beside(self, attention: LayerAttention) -> Tensor:
        """(I, t) Q, the attention of every image's null token to its visual tokens.

        Raises:
            InputError: Only the last token comes after an image.
        """
        return NullToken(offset=self.offset)(attention)

    def correct(self, scores: Tensor, where: Where) -> Tensor:
        """(I, t) P · ln(P / Q) or P / Q, where P are shares of the scores."""
        valid = where.layout.valid
        mine, prior = (
            part / (part.sum(-1, keepdim=True) + _LEAST)
            for part in (x.masked_fill(~valid, 0.0) for x in (scores, where.beside.to(scores)))
        )
        ratio = (mine + _LEAST) / (prior + _LEAST)
        return ratio if self.by == "ratio" else mine * ratio.log()
