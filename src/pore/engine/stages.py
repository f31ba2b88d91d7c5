"""What a method is declared with: its stages, what their rules see and what they decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from pore.bias.where import Positions, Where
from pore.engine.corrections import Correction
from pore.engine.readers import Reader
from pore.errors import BudgetError
from pore.families.base import Family
from pore.layout import Layout
from pore.tensors.selection import budget
from pore.tower.stages import Encoded, TowerAttention, TowerStage

Merges = Literal["all", "some"]
"""Which of the visual tokens that do not stay go into those that do: all of them, or some."""


@dataclass(frozen=True)
class View:
    """What a rule sees when its stage acts: the visual tokens of all I images of a batch.

    The images lie side by side in padded tensors of t columns, whatever sample each is of; where
    `layout.valid` is False nothing is meant.

    Attributes:
        layout: Where the visual tokens lie in the sequence as it is now.
        hidden_states: (B, L, D) the states that enter the stage's layer, of all tokens.
        attention: What the stage's reader returned; with `LastToken` the (I, t) text-visual
            attention A. None without a reader.
        padding: (I, t) the share of every token's patch that is letterbox padding, from 0 to 1;
            None unless the stage has `padding=True`.
        generator: Source of chance for methods that draw; seeded anew for every block.
        norm: The decoder's final norm.
        memory: What the stage's `prepare` returned for this prompt; None without one.
        input_ids: (B, L) token ids of the tokens that are left; None for a prompt that was given
            as embeddings.
        tower: What the vision tower made of every image; None unless the stage has `tower=True`.
        positions: (A, B, L) the positions with which the tokens entered the decoder, on A axes (3
            in Qwen-VL, else 1); None before the first layer, where they are not given out yet.
        rotary: Makes the decoder's rotary tables for states (B, m, D) at positions (B, m).
        dense: Whether the tokens that stay are numbered anew after the stage.
        correction: What corrects the attention that ranks, or None.
        beside: What the correction read beside that attention.
        bias_at: Where the correction counts positions, see `Where`.
        earlier: (B, L, D) the states with which the same tokens entered the layer that the stage
            names as `earlier`; None without one.
        sizes: (I, t) how many times attention counts each token so far; None: once.
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
    positions: Tensor | None = None
    rotary: Callable[[Tensor, Tensor], Any] | None = None
    dense: bool = False
    correction: Correction | None = None
    beside: Any = None
    bias_at: Positions = "original"
    earlier: Tensor | None = None
    sizes: Tensor | None = None

    def corrected(self, scores: Tensor) -> Tensor:
        """Scores without what position alone adds to them, as the stage's correction has it.

        Args:
            scores: (I, t) scores with the position bias in them.

        Returns:
            (I, t) scores without: A / P, where the correction is a position bias (PoRe Eq. 2). The
            scores themselves where the stage has no correction.

        Raises:
            ProfileMismatchError: The correction is for images of another number of tokens.
            ScoreError: A correction of the user's own gives something else than (I, t) scores.
        """
        if self.correction is None:
            return scores
        return self.correction.correct(scores, self._where)

    @cached_property
    def _where(self) -> Where:
        return Where(self.layout, self.bias_at, self.beside)

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
    """What a rule decides.

    `Selection(keep)` drops tokens and leaves the others as they are; the rest is for methods that
    merge, or that drop more than visual tokens.

    Attributes:
        keep: (I, t) bool, the visual tokens that stay.
        features: (I, t, D) new states, written to the tokens that stay; None leaves them.
        raster: (I, t) which original token each new state stands for, as in `Layout.raster` (-1 for
            none); None where they stand for what they did.
        structure: For every image, whether its structure tokens stay, as the one that ends a row of
            patches; None keeps them all.
        others: (B, L) bool, True at further tokens that go, such as text; None drops none.
        sizes: (I, t) how many times attention counts each token that stays, from the stage's layer
            on: the logarithm is added to the logits of its key, in the prefill and while decoding.
            For a merged token, how many it stands for. None leaves that as it is: once.
    """

    keep: Tensor
    features: Tensor | None = None
    raster: Tensor | None = None
    structure: Sequence[bool] | None = None
    others: Tensor | None = None
    sizes: Tensor | None = None


@dataclass(frozen=True)
class Limit:
    """A reason why a family does not take a method, or takes it only in part.

    Attributes:
        reason: Why, and what to do instead.
        unless: When the method works all the same, such as "it acts after those layers"; None where
            it never does with its settings.
    """

    reason: str
    unless: str | None = None


@dataclass(frozen=True)
class Stage:
    """One place where a method drops visual tokens.

    FastV is one stage, `Stage(2, rule, LastToken())`: layer 1 runs on all tokens and the reader
    takes the last token's attention from it; the rule decides by that, and layer 2 is the first
    that sees fewer tokens.

    Attributes:
        layer: The first decoder layer, from 0, that sees fewer tokens. 0 acts on the embeddings,
            before the decoder; the number of layers acts on what the last layer gives.
        rule: Decides which tokens stay. It runs out of any autocast, and without a graph unless it
            `merges`; so do `attention` and `prepare`, always without a graph.
        attention: The reader, such as `LastToken()`: takes from the attention of the layer before
            what the rule then finds as `view.attention`. None where the rule reads none.
        ahead: Read the attention of `layer` itself instead: the layer is run up to its attention,
            only to be read, then tokens are dropped, and it is run again on those left. On the
            embeddings that is the first layer's, without RoPE: positions are given out later.
        prepare: Called once for every prompt with a view of what enters the decoder; of a stage on
            the embeddings, of what comes to it. Reader and rule find what it returns as `memory`.
            Stages with the same `prepare` share the result.
        positions: Whether the tokens that stay keep their "original" positions, or are numbered
            anew ("dense") as if the dropped ones had never been there. None is "dense" on the
            embeddings and "original" in the decoder.
        padding: Whether the rule reads `view.padding`.
        tower: Whether the rule reads `view.tower`.
        tower_attention: Which attention the rule reads there, in `Encoded.attention`, if any.
        merges: Whether the rule gives tokens that stay new states.
        proportional: Whether it also says how many times attention counts them, in
            `Selection.sizes`. Needs SDPA or eager attention, and a layer from 1 on.
        in_place: Whether each new state lies at the place of a token that went into it, so that
            what the decoder adds at that place later (DeepStack) belongs to it, too. A model that
            adds something refuses merged tokens otherwise.
        curve: For calibration, where the reader returns more than attention: picks from its result
            the (I, t) attention that a position bias divides. None: the result is that attention.
        correction: What corrects the attention that ranks: `view.corrected` applies it.
        bias_at: Where the correction counts positions: "original", or "dense" in the new numbering.
        earlier: A decoder layer before `layer`: the rule finds what entered it as `view.earlier`.
        before_mlp: Let the rule see the states between attention and MLP of the layer before, and
            write new ones there: that MLP computes from them. Tokens are dropped behind it.
        forgets: Whether later tokens see in no layer what is dropped here. Else those before the
            stage show them what they have cached. It stays in the cache, and no memory is saved.
        idle: Called with the memory of the prompt: whether the stage has nothing to do for it, and
            is passed over. None: never.
    """

    layer: int
    rule: Callable[[View], Selection]
    attention: Reader | None = None
    ahead: bool = False
    prepare: Callable[[View], Any] | None = None
    positions: Positions | None = None
    padding: bool = False
    tower: bool = False
    tower_attention: TowerAttention | None = None
    merges: bool = False
    proportional: bool = False
    in_place: bool = False
    curve: Callable[[Any], Tensor] | None = None
    correction: Correction | None = None
    bias_at: Positions = "original"
    earlier: int | None = None
    before_mlp: bool = False
    forgets: bool = False
    idle: Callable[[Any], bool] | None = None

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


class Method(Protocol):
    """What a run needs of a method; `Pruner` is the class that has it.

    A method that draws by chance has a `seed` as well.
    """

    @property
    def name(self) -> str:
        """Its name, for messages and the report."""

    def stages_in(self, depth: int) -> Sequence[Stage | TowerStage]:
        """Where it acts in so many decoder layers, first the vision tower, then by layer."""

    def limits(self, family: Family) -> list[Limit]:
        """What a family does not take of it."""

    def check(self, model: nn.Module, family: Family) -> None:
        """Raise an error where its settings do not fit a model."""
