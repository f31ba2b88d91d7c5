"""Corrections remove the position bias from the attention that ranks visual tokens.

Text-visual attention A is biased: later tokens score higher for their position alone. A correction
turns A into Â. PoRe's own divides by P, a function of the position; others look at the layer
itself, for example at its queries and keys before RoPE rotates them, or at the attention of a token
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
        """Its name in tables."""

    def correct(self, scores: Tensor, where: Where) -> Tensor:
        """Scores without what position alone adds to them.

        Args:
            scores: (I, t) scores of the visual tokens of I images, at least float32 or as the model
                computes; entries that are not `where.layout.valid` can hold any value.
            where: Where the tokens lie.

        Returns:
            (I, t) scores; the highest are kept.
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
            weights: The fingerprint of its weights, or a function that returns it.
            config: The settings of its config, or a function that returns them.

        Raises:
            ProfileMismatchError: It was calibrated under other conditions; the message names all
                that differ.
        """


class AttentionCorrection:
    """A correction that looks at more of the layer than the attention that it corrects.

    A subclass defines `kind` and those of these methods that it needs. They are called in this
    order.
    """

    kind: str

    def through(self, attention: LayerAttention) -> LayerAttention:
        """The attention of the layer as the method should read it, for example without RoPE."""
        return attention

    def heads(self, weights: Tensor, where: Where) -> Tensor:
        """Weights (I, H, R, t) of R text tokens on the visual ones, before heads are averaged."""
        return weights

    def beside(self, attention: LayerAttention) -> Any:
        """What else `correct` needs from the layer; `correct` gets it as `where.beside`."""
        return None

    def correct(self, scores: Tensor, where: Where) -> Tensor:
        """See `Correction`; returns the scores unchanged, for corrections that act on heads."""
        return scores

    def check(self, **conditions: Any) -> None:
        """Nothing to refuse: nothing was calibrated."""


def seen_through(
    correction: AttentionCorrection, attention: LayerAttention, bias_at: Positions
) -> tuple[LayerAttention, Any]:
    """The attention of a layer as a method should read it, and what else the correction reads.

    Args:
        correction: The correction.
        attention: The layer's attention.
        bias_at: Which position of a token the correction counts; see `Where`.
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
    """A user's function, as a correction."""

    kind = "own"

    def __init__(self, function: Callable[[Tensor, Where], Tensor]) -> None:
        self._function = function

    def correct(self, scores: Tensor, where: Where) -> Tensor:
        """What the function returns.

        Raises:
            ScoreError: It does not return a tensor with the shape of the scores.
        """
        found = self._function(scores, where)
        if not isinstance(found, Tensor) or found.shape != scores.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ScoreError(
                f"The correction returned {shape}, but it gets scores of shape "
                f"{tuple(scores.shape)}, one for every visual token of every image, and must "
                "return the same shape."
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
