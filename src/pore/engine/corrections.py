"""Corrections: what takes the position bias out of the attention that ranks visual tokens.

Text-visual attention A is biased: later tokens score higher for their position alone. A correction
makes Â of it. PoRe's own is a division by P, which is a function of the position; others look at
the layer itself, such as at its queries and keys before RoPE turns them, or at what a token pays
that cannot see the question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from pore.bias.where import Positions, Where
from pore.engine.readers import LayerAttention
from pore.errors import ScoreError


@runtime_checkable
class Correction(Protocol):
    """What every correction has; `pore.PositionBias` is one, and so is every `AttentionCorrection`.

    Give one to a method as `reweight`.
    """

    @property
    def kind(self) -> str:
        """What it is in a word, for tables."""

    def correct(self, scores: Tensor, where: Where) -> Tensor:
        """Scores without what position alone adds to them.

        Args:
            scores: (I, t) scores of the visual tokens of I images, at least float32 or as the model
                computes; entries that are not `where.layout.valid` hold anything.
            where: Where the tokens lie.

        Returns:
            (I, t) scores, the highest being kept.
        """

    def check(
        self,
        *,
        layer: int | None = None,
        normalize: str | None = None,
        model: str | None = None,
        revision: str | None = None,
        weights: str | Callable[[], str | None] | None = None,
        config: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        """Refuse a model, or a use in it, that the correction was not calibrated for.

        Args:
            layer: The pruned layer whose ranking is corrected.
            normalize: The word for what the method reads there.
            model: Name or path of the model.
            revision: Its revision.
            weights: The fingerprint of its weights, or what gives it where it is needed.
            config: The settings of its config, or what gives them.

        Raises:
            ProfileMismatchError: It was calibrated elsewhere; the message names all that differs.
        """


class AttentionCorrection:
    """A correction that looks at the layer whose attention it corrects, beside the attention.

    A subclass gives `kind` and whichever of these it needs. They are called in this order.
    """

    kind: str

    def through(self, attention: LayerAttention) -> LayerAttention:
        """The attention of the layer as the method is to read it, such as without RoPE."""
        return attention

    def heads(self, weights: Tensor, where: Where) -> Tensor:
        """Weights (I, H, R, t) of R text tokens on the visual ones, before heads are averaged."""
        return weights

    def beside(self, attention: LayerAttention) -> Any:
        """What else of the layer `correct` needs; it finds that as `where.beside`."""
        return None

    def correct(self, scores: Tensor, where: Where) -> Tensor:
        """See `Correction`; the scores as they are, where heads are corrected already."""
        return scores

    def check(self, **conditions: Any) -> None:
        """Nothing to refuse: nothing was calibrated."""


def seen_through(
    correction: AttentionCorrection, attention: LayerAttention, bias_at: Positions
) -> tuple[LayerAttention, Any]:
    """The attention of a layer as a method is to read it, and what else the correction reads.

    Args:
        correction: The correction.
        attention: The layer's attention.
        bias_at: Where the correction counts positions.
    """
    ranked = correction.through(attention)
    where = Where(attention.layout, bias_at)
    seen = replace(
        attention,
        as_ranked=None if ranked is attention else ranked,
        each_head=partial(correction.heads, where=where),
    )
    return seen, correction.beside(attention)


class OwnCorrection:
    """A function of the user's own, as a correction."""

    kind = "own"

    def __init__(self, function: Callable[[Tensor, Where], Tensor]) -> None:
        self._function = function

    def correct(self, scores: Tensor, where: Where) -> Tensor:
        """What the function gives.

        Raises:
            ScoreError: That is no tensor of the scores' shape.
        """
        found = self._function(scores, where)
        if not isinstance(found, Tensor) or found.shape != scores.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ScoreError(
                f"The correction gave {shape}, but it is given scores of shape "
                f"{tuple(scores.shape)}, one for every visual token of every image, and must give "
                "as many back."
            )
        return found

    def check(self, **conditions: Any) -> None:
        """Nothing to refuse: what it is for is up to the user."""


Reweight = Correction | Callable[[Tensor, Where], Tensor]


"""What a method takes as `reweight`: a correction, or a function that corrects."""


def correction_of(reweight: Reweight | None) -> Correction | None:
    """A method's `reweight` as a correction.

    Args:
        reweight: A correction, a function as in `OwnCorrection`, or None.

    Raises:
        ScoreError: It is none of these.
    """
    if reweight is None or isinstance(reweight, Correction):
        return reweight
    if callable(reweight):
        return OwnCorrection(reweight)
    raise ScoreError(
        f"reweight takes a position bias, another correction (pore.corrections), or a function of "
        f"scores and where they are; {type(reweight).__name__} is none of them."
    )
