"""FEATHER: attention without RoPE, and a grid over the image, in two stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pore.cost.shapes import ModelShape
from pore.engine.corrections import Reweight
from pore.engine.readers import LastToken, LayerAttention
from pore.engine.stages import Selection, View
from pore.errors import BudgetError
from pore.layout import Image, Layout
from pore.methods._checks import check_whole
from pore.methods.pyramiddrop import pyramid
from pore.methods.staged import StagedPruner
from pore.tensors.gathering import inverse
from pore.tensors.selection import budget, by_score, check_keep, top_k


@dataclass(frozen=True)
class FEATHER(StagedPruner):
    """Rank by attention without RoPE, and spread what stays over the image (arXiv 2412.13180).

    A token's score is the attention of the last text token in the layer before, from queries and
    keys that RoPE has not rotated, with a softmax over the visual tokens alone, averaged over
    heads. It is RoPE that makes early layers favour the bottom of an image. Before the first of
    `layers` every `stride`-th row and column of the image's grid stays whatever its score, and so
    do the best of the other tokens; before the second the best of all that are left. Positions
    stay.

    At the first stage the best `share` of the tokens stay beside the grid, and at the second, which
    spares no grid, about `share` squared of what is left: `share` is the cube root of `keep` as a
    fraction. The authors' 0.3 is `keep=20` of 729 tokens, 2.7 %.

    The grid is that of the image, of each tile if it comes in tiles, and of each frame of a video.
    If none is known, the image counts as a square; if the number of tokens is not a square either,
    every `stride` squared-th token is taken.

    Attributes:
        keep: Tokens per image after the last stage (int), or the fraction of the original number
            (float); with `faithful`, the authors' share.
        layers: The 0-based index of the first pruned layer of every stage; the authors' `k`. Two
            with a `stride`, any number without.
        stride: Rows and columns from one grid token to the next; None for no grid (the authors'
            "FastV w/o RoPE"): the stages then go down to `keep` in equal ratios.
        reweight: The position bias P that divides the scores, or another correction, or one for
            every stage, or None. Without RoPE little bias should be left. The grid stays anyway.
        faithful: The authors' budget. `keep` is a fraction, 1 minus their `fastv_ratio`: the best
            int(n keep) of n tokens stay together with the grid, so that the number depends on how
            many of the grid are among the best; then int(m keep keep) of the m left. Without a grid
            int(m keep) at every stage.
    """

    keep: int | float
    layers: tuple[int, ...] = (8, 16)
    stride: int | None = 3
    reweight: Reweight | tuple[Reweight, ...] | None = None
    faithful: bool = False

    name: ClassVar[str] = "FEATHER"
    paper: ClassVar[str] = "arXiv 2412.13180"
    reweightable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        if self.faithful and not isinstance(self.keep, float):
            raise BudgetError(
                f"With faithful=True keep is the share that the authors keep by score, such as "
                f"0.3, not a number of tokens such as {self.keep}."
            )
        if self.stride is not None:
            check_whole(1, stride=self.stride)
            if len(self.layers) != 2:
                raise BudgetError(
                    f"layers={self.layers!r}: with a grid there are two stages; give two layers, "
                    "or stride=None."
                )

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> FEATHER:
        """Stages at a quarter and half of the decoder."""
        depth = shape.decoder.layers
        first = max(1, depth // 4)
        return cls(keep, (first, max(first + 1, depth // 2)))

    def reader(self) -> LastTokenWithoutRope:
        """The last text token's attention, without RoPE."""
        return LastTokenWithoutRope()

    def remaining(self, visual: int) -> Sequence[int]:
        """Tokens left after every stage, for an image that came with `visual` tokens.

        Raises:
            BudgetError: The image has fewer tokens than `keep`, or the number depends on it.
        """
        if self.faithful:
            if self.stride is not None:
                raise BudgetError(
                    "How many tokens the authors' code leaves depends on the image; leave "
                    "`faithful` off for a number that is known in advance."
                )
            left = [visual]
            for _ in self.layers:
                left.append(_share(left[-1], self.keep))
            return left[1:]
        if self.stride is None:
            return pyramid(self.keep, len(self.layers), visual)
        last = budget(self.keep, visual)
        best = max(last, int(round(visual * (last / visual) ** (1 / 3), 6)))
        return [min(visual, best + (-(-math.isqrt(visual) // self.stride)) ** 2), last]

    def score(self, stage: int, view: View) -> Tensor:
        """The attention of the last text token without RoPE, divided by P if there is one."""
        return view.corrected(view.attention)

    def _select(self, stage: int, view: View) -> Selection:
        if self.stride is None:
            return super()._select(stage, view)
        valid = view.layout.valid
        if stage == 0:
            grid = on_grid(view.layout, self.stride) & valid
            if self.faithful:
                counts = [_share(count, self.keep) for count in view.layout.counts]
                return Selection(top_k(self.score(0, view), counts, valid) | grid)
            rank = inverse(by_score(self.score(0, view), valid))
            first = grid * rank.shape[1] - rank
            return Selection(top_k(first, self._left(0, view), valid))
        if self.faithful:
            counts = [_share(count, self.keep, self.keep) for count in view.layout.counts]
            return Selection(top_k(self.score(1, view), counts, valid))
        return super()._select(stage, view)


def _share(count: int, *shares: float) -> int:
    """`count` times all shares, truncated as in the authors' code."""
    left = int(math.prod(shares, start=float(count)))
    if left < 1:
        raise BudgetError(
            f"The authors' code keeps none of {count} visual tokens by these shares "
            f"({', '.join(map(str, shares))}); ask for more, or faithful=False."
        )
    return left


@dataclass(frozen=True)
class LastTokenWithoutRope:
    """Reads the last text token's attention, computed from queries and keys without RoPE."""

    measures: ClassVar[str] = "visual, without RoPE"

    def __call__(self, attention: LayerAttention) -> Tensor:
        """(I, t) attention to the visual tokens of every image."""
        seen = (attention.as_ranked or attention).without_rope
        return LastToken("visual")(replace(seen, as_ranked=None, each_head=attention.each_head))


def on_grid(layout: Layout, stride: int) -> Tensor:
    """Which visual tokens lie in every `stride`-th row and column, starting with the first.

    Args:
        layout: Where the visual tokens lie.
        stride: Rows and columns from one grid token to the next.

    Returns:
        (I, t) bool; arbitrary where not `valid`.
    """
    marked = torch.zeros_like(layout.valid)
    _, patches = layout.shows()
    for i, (image, patch) in enumerate(zip(layout.images, patches, strict=True)):
        shape = grid_of(image)
        if shape is None:
            marked[i] = patch % stride**2 == 0
            continue
        place = patch % (shape[0] * shape[1])  # for a video, the place in its frame
        row, column = place // shape[1], place % shape[1]
        marked[i] = (row % stride == 0) & (column % stride == 0)
    return marked & (patches >= 0)


def grid_of(image: Image) -> tuple[int, int] | None:
    """(height, width) in which the tokens of an image, a tile or a frame lie; None if not known.

    Where nothing says it, a square number of tokens lies in a square, as in the authors' code.
    """
    count = image.count if image.tiles == 1 else 0
    side = math.isqrt(count)
    return image.cells or ((side, side) if side and side**2 == count else None)
