"""What a method is declared with: its stages, what their rules see and what they decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pore.engine.readers import Reader
from pore.errors import BudgetError
from pore.layout import Layout
from pore.tensors.selection import budget
from pore.tower.stages import Encoded

if TYPE_CHECKING:
    from pore.bias.position_bias import PositionBias


Index = Literal["original", "dense"]


Positions = Literal["original", "dense"]


@dataclass(frozen=True)
class View:
    """What a stage's rule sees: the visual tokens of all images of the batch, side by side.

    Attributes:
        layout: Where the visual tokens lie now.
        hidden_states: (B, L, D) the states that enter the stage's layer.
        attention: What the stage's reader took from its layer's attention; (I, t) text-visual
            attention A with `LastToken`, None without a reader.
        padding: (I, t) share of every token's patch that is letterbox padding, where asked for.
        generator: Source of chance for methods that draw.
        norm: The decoder's final norm.
        memory: What the stage's `prepare` made of the prompt.
        input_ids: (B, L) token ids of the prompt, of the tokens that are left; None for a prompt
            that was given as embeddings.
        tower: What the vision tower made of every image, where asked for.
        rotary: Makes the decoder's rotary tables for states (B, m, D) at positions (B, m).
        dense: Whether positions are numbered anew behind the stage.
    """

    layout: Layout
    hidden_states: Tensor
    attention: Any
    padding: Tensor | None
    generator: torch.Generator
    norm: Callable[[Tensor], Tensor]
    memory: Any = None
    input_ids: Tensor | None = None
    tower: tuple[Encoded, ...] | None = None
    rotary: Callable[[Tensor, Tensor], Any] | None = None
    dense: bool = False

    def reweighted(self, scores: Tensor, bias: PositionBias, index: Index = "original") -> Tensor:
        """Scores divided by the position bias: PoRe Eq. 2.

        Args:
            scores: (I, t) scores with the position bias in them.
            bias: P over the visual tokens of one image.
            index: Where P is read: at the "original" raster index of every token, or where a token
                of the full image has the same distance to the text as this one has now, in the
                "dense" numbering of methods that number positions anew: the last of t tokens at
                the last entry of P.

        Returns:
            (I, t) scores without.

        Raises:
            ProfileMismatchError: An image has another number of tokens than P.
        """
        for image in self.layout.images:
            bias.check(n=image.count)
        n = len(bias)
        if index == "original":
            return bias.divide(scores, self.layout.places(n))
        slots = torch.arange(scores.shape[-1], device=scores.device)
        counts = self.layout.valid.sum(-1, keepdim=True)
        return bias.divide(scores, (n - counts + slots).clamp(0, n - 1))

    @property
    def features(self) -> Tensor:
        """(I, t, D) the states of the visual tokens; arbitrary where not `valid`."""
        return self.layout.gather(self.hidden_states)

    def budget(self, keep: int | float | Callable[[int], int]) -> list[int]:
        """The number of tokens that `keep` means for every image, as it entered the model.

        Args:
            keep: Tokens per image, the fraction kept, or what gives the number for an image that
                came with so many tokens.

        Raises:
            BudgetError: An image has fewer; the message names it.
        """
        counts = []
        for image in self.layout.images:
            try:
                visual = len(image.columns)
                counts.append(keep(visual) if callable(keep) else budget(keep, visual))
            except BudgetError as error:
                raise BudgetError(f"Image {image.index} of sample {image.row}: {error}") from None
        return counts


@dataclass(frozen=True)
class Selection:
    """What a stage decides.

    Attributes:
        keep: (I, t) bool, the visual tokens that stay.
        features: (I, t, D) new states of the tokens that stay, or None to leave them.
        raster: (I, t) the original token that each new state stands for, see `Layout.raster`; None
            where they stand for what they did.
        structure: Of every image, whether its structure tokens (the end of a row) stay; None keeps
            them all.
        others: (B, L) bool, True at further tokens that go; None drops none.
    """

    keep: Tensor
    features: Tensor | None = None
    raster: Tensor | None = None
    structure: Sequence[bool] | None = None
    others: Tensor | None = None


@dataclass(frozen=True)
class Limit:
    """What of a method a family does not take.

    Attributes:
        reason: Why, and what to do.
        unless: Layers or images with which the method works all the same; None where it never does
            with its settings.
    """

    reason: str
    unless: str | None = None


@dataclass(frozen=True)
class Stage:
    """One place where a method drops visual tokens.

    Attributes:
        layer: The first decoder layer (from 0) that sees fewer tokens. 0 acts on the embeddings,
            the number of layers on what the last layer gives.
        rule: Decides which tokens stay. It runs out of any autocast, and without a graph unless it
            `merges`; so do `attention` and `prepare`, always without a graph.
        attention: Takes from the attention of layer - 1 what the rule reads, such as `LastToken`;
            None when it reads none.
        ahead: Whether the reader looks at layer instead, whose queries and keys are then computed
            once in advance from the states that enter it.
        prepare: Called once for every prompt, on what enters the decoder; reader and rule find
            what it gives in `memory`. Stages that share it share the result.
        positions: Whether the tokens that stay keep their "original" positions, or are numbered
            anew ("dense") as where the layers that follow never saw the dropped ones. None is
            dense on the embeddings and original in the decoder.
        padding: Whether the rule reads letterbox padding.
        tower: Whether the rule reads what the vision tower made of the images.
        merges: Whether the rule gives tokens that stay new states.
        curve: What of the reader's result is the attention (I, t) that a position bias divides, for
            calibration; None is the whole.
    """

    layer: int
    rule: Callable[[View], Selection]
    attention: Reader | None = None
    ahead: bool = False
    prepare: Callable[[View], Any] | None = None
    positions: Positions | None = None
    padding: bool = False
    tower: bool = False
    merges: bool = False
    curve: Callable[[Any], Tensor] | None = None

    @property
    def dense(self) -> bool:
        """Whether positions are numbered anew."""
        return self.positions == "dense" or (self.positions is None and self.layer == 0)

    @property
    def reads_layer(self) -> int | None:
        """The decoder layer whose attention is read, or None."""
        if self.attention is None:
            return None
        return self.layer if self.ahead else self.layer - 1
