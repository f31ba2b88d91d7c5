"""After ST3: drops visual tokens at regular distances in depth, as the paper describes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from pore.cost.shapes import ModelShape
from pore.engine.corrections import Reweight
from pore.engine.readers import LastToken, LayerAttention, Reader, received, text_rows
from pore.engine.stages import View
from pore.errors import BudgetError
from pore.methods._checks import check_choice, check_whole
from pore.methods.pyramiddrop import pyramid
from pore.methods.staged import BY_A_BLIND_LAYER, StagedPruner
from pore.tensors.selection import budget, check_keep

Query = Literal["last", "text"]


@dataclass(frozen=True)
class ST3Style(StagedPruner):
    """Drop visual tokens every few layers by the attention they get (after arXiv 2412.20105).

    EXPERIMENTAL. There is no code of ST3, and only the abstract of the paper was available: ST3
    drops a fixed share of the tokens every few layers, by the attention that they receive
    (progressive visual token pruning). Everything else is a setting here: where it begins, how
    often, how much, whose attention. The defaults are ours and no result of the paper is claimed.

    Before layers `start`, `start + stride` and so on, `prunings` times, tokens are ranked by the
    attention that they get in the layer before, averaged over heads, and the lowest are dropped.
    Kept tokens keep their positions. Without a `ratio` their number goes down to `keep` in equal
    ratios: each time a share of 1 - (keep / n) ** (1 / prunings) is dropped. With a `ratio`, each
    pruning drops that share of what is left, never below `keep`, and the last one drops whatever is
    still above `keep`.

    The paper's other half is NOT built: the annealing that removes visual tokens from the cache
    while the answer is generated. Here the tokens that are left after the prompt stay to the end.

    Attributes:
        keep: Tokens per image after the last pruning (int), or the fraction (float).
        start: The 0-based index of the first pruned layer; scores come from the layer before.
        stride: Number of layers from one pruning to the next.
        prunings: How often tokens are dropped.
        ratio: Share of what is left that each pruning drops; None for equal ratios down to `keep`.
        query: Whose attention counts: that of the "last" token, or the mean over all "text" tokens
            after the image.
        reweight: The position bias P that divides the attention, or one for every pruning, or None.
    """

    keep: int | float
    start: int = 2
    stride: int = 4
    prunings: int = 6
    ratio: float | None = None
    query: Query = "last"
    reweight: Reweight | tuple[Reweight, ...] | None = None

    name: ClassVar[str] = "ST3-style"
    paper: ClassVar[str] = "after arXiv 2412.20105; no code to compare with"
    reweightable: ClassVar[bool] = True
    harmed: ClassVar[str | None] = BY_A_BLIND_LAYER
    experimental: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_whole(1, start=self.start, stride=self.stride, prunings=self.prunings)
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise BudgetError(f"ratio is a share between 0 and 1, not {self.ratio!r}.")
        check_choice(Query, query=self.query)
        super().__post_init__()

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> ST3Style:
        """Every eighth of the decoder from layer 2 on, up to six times; ours."""
        depth = shape.decoder.layers
        start, stride = max(1, min(2, depth - 1)), max(1, depth // 8)
        return cls(keep, start, stride, min(6, 1 + max(0, depth - 1 - start) // stride))

    def first_layers(self) -> tuple[int, ...]:
        """The first layer of every stage that sees fewer tokens."""
        return tuple(self.start + self.stride * i for i in range(self.prunings))

    def reader(self) -> Reader:
        """The attention of the last token, or of all text after the image."""
        return LastToken() if self.query == "last" else TextMean()

    def remaining(self, visual: int) -> Sequence[int]:
        """Tokens left after every pruning, for an image that came with `visual` tokens."""
        return left_after(self.keep, self.prunings, self.ratio, visual)

    def score(self, stage: int, view: View) -> Tensor:
        """The attention that every token gets, divided by P if there is one."""
        return view.corrected(view.attention)


def left_after(keep: int | float, prunings: int, ratio: float | None, visual: int) -> list[int]:
    """Tokens of one image that are left after every pruning.

    Args:
        keep: Tokens left after the last pruning, or the fraction.
        prunings: How many prunings there are.
        ratio: Share of what is left that each pruning drops; None for equal ratios.
        visual: Tokens that the image came with.

    Returns:
        One number for each, none larger than the one before.

    Raises:
        BudgetError: The image has fewer tokens than should be kept.
    """
    last = budget(keep, visual)
    if ratio is None:
        return pyramid(last, prunings, visual)
    between = [round(visual * (1 - ratio) ** i) for i in range(1, prunings)]
    return [*(max(last, count) for count in between), last]


@dataclass(frozen=True)
class TextMean:
    """Reads the attention that every visual token gets from the text after the image: the mean over
    tokens and heads."""

    measures: ClassVar[str] = "text"

    def __call__(self, attention: LayerAttention) -> Tensor:
        """(I, t) attention, at least float32."""
        return received(attention, *text_rows(attention.layout), "mean")
