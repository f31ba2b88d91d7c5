"""Scored: the place for your own scorer, trained or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from pore.cost.shapes import ModelShape
from pore.engine.limits import check_layer
from pore.engine.readers import LastToken
from pore.engine.stages import Selection, Stage, View
from pore.errors import BudgetError, ScoreError
from pore.families.base import Family
from pore.layout import Layout
from pore.methods.scorer import BudgetPruner
from pore.tensors.attention import Normalize, check_normalize
from pore.tensors.selection import top_k

Scorer = Callable[[Tensor, Layout, "Tensor | None"], Tensor]
"""Returns scores (I, t) of the visual tokens, the higher to be kept first, from

- hidden_states (B, L, D), the states that enter the pruned layer;
- layout, which tells where the visual tokens, the padding and the last token are:
  `layout.gather(hidden_states)` is (I, t, D), the states of the visual tokens;
- attention (I, t), text-visual attention of the layer before, or None if it is not asked for.

Scores of entries that are not `layout.valid` are ignored."""


@dataclass(frozen=True)
class Scored(BudgetPruner):
    """Keep the visual tokens that a scorer of your own ranks highest.

    Use it for trained scorers, which a training-free library does not contain
    (docs/trained-methods.md), and to try out a score before it becomes a method. Inside the decoder
    kept tokens keep their original positions; before it (layer 0) positions are numbered anew.
    Several in a `Chain` make a schedule over layers.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
        scorer: An `nn.Module` or any callable, see `Scorer`; its device and dtype are its own.
        layer: The 0-based index of the first pruned layer; 0 is before the decoder.
        normalize: "prompt" or "visual" to give the scorer the attention of the last text token in
            layer - 1, as FastV reads it; None to read none.
    """

    scorer: Scorer
    layer: int = 2
    normalize: Normalize | None = None

    name: ClassVar[str] = "Scored"
    paper: ClassVar[str] = "yours"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.scorer):
            raise ScoreError(
                f"scorer must be callable as scorer(hidden_states, layout, attention), which "
                f"{type(self.scorer).__name__} is not."
            )
        if self.normalize is not None:
            check_normalize(self.normalize)
            if self.layer == 0:
                raise BudgetError(
                    "Before layer 0 there is no layer whose attention could be read; choose "
                    "layer=1 or later, or normalize=None."
                )

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> None:
        """None: it needs a scorer."""

    def stages(self) -> Sequence[Stage]:
        """One stage, before the chosen layer."""
        reader = None if self.normalize is None else LastToken(self.normalize)
        return [Stage(self.layer, self._select, reader)]

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse a layer that the decoder lacks."""
        check_layer(self.layer, family, model, first=0)

    def _select(self, view: View) -> Selection:
        valid = view.layout.valid
        scores = self.scorer(view.hidden_states, view.layout, view.attention)
        if not isinstance(scores, Tensor):
            raise ScoreError(
                f"The scorer returned {type(scores).__name__}, but scores must be a tensor "
                f"(images, visual tokens), here of shape {tuple(valid.shape)}."
            )
        if scores.shape != valid.shape:
            raise ScoreError(
                f"The scorer returned scores of shape {tuple(scores.shape)}, but this batch has "
                f"{valid.shape[0]} images of up to {valid.shape[1]} visual tokens: the shape must "
                f"be {tuple(valid.shape)}."
            )
        return Selection(top_k(scores.to(valid.device), view.budget(self.keep), valid))
