"""CLSE: tokens whose fine structure changes in the first layers, times the attention to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from pore.cost.shapes import ModelShape
from pore.engine.corrections import Reweight
from pore.engine.readers import LastToken
from pore.engine.stages import Stage, View
from pore.errors import BudgetError, ScoreError, UnsupportedModelError
from pore.families.base import Family
from pore.layout import Image, Layout
from pore.methods._checks import check_choice, check_whole
from pore.methods.feather import grid_of
from pore.methods.pyramiddrop import check_pyramid, pyramid
from pore.methods.staged import BY_A_BLIND_LAYER, StagedPruner
from pore.tensors.gathering import widened
from pore.tensors.selection import budget

By = Literal["both", "attention", "evolution"]

_TINY = 1e-6  # the authors' guard against divisions by 0
_SHARES = (1.72, 1.09, 0.32)
"""Tokens after the three stages, as shares of what the authors call the number of tokens."""


@dataclass(frozen=True)
class CLSE(StagedPruner):
    """Keep tokens that are attended to and whose fine structure changes (arXiv 2606.24165).

    The spectral energy of a token is what a Gaussian high-pass leaves of it: on the grid of the
    image every channel of the states is filtered by a two-dimensional Fourier transform, and its
    magnitudes at the token are averaged over channels. How much this differs between what enters
    layer `since` and what enters the first of `layers`, relative to its size, at most 1, is
    standardised over the image's tokens; a sigmoid of it, divided by `temperature`, is the
    evolution factor.

    At the first stage a token scores this factor times the attention of the last text token in the
    layer before, averaged over heads; at the others the attention alone. The highest stay, with
    their positions. With `reweight=P` the attention is divided by P at every stage.

    The filter sees each tile of an image, and each frame of a video, by itself, which is ours; the
    image counts as one where it is standardised. A place on the grid that no token shows counts as
    the mean of the tile's tokens.

    The layers before a stage cache what they have seen, and later tokens see it there, as in the
    authors' Qwen2-VL; in their LLaVA it is cut out of the cache.

    Attributes:
        keep: Tokens per image after the last stage (int), or the fraction of the original number
            (float). With three stages the two before leave 1.72 / 0.32 and 1.09 / 0.32 times as
            many, the authors' ratio, or all that there are; with another number of stages they
            come down in equal ratios. Or a tuple: what is left of the original number after every
            stage. The authors' tables for LLaVA-1.5 are (330, 210, 62) for "192" tokens,
            (220, 140, 41) for "128" and (110, 70, 20) for "64".
        layers: The 0-based index of the first layer of every stage that sees fewer tokens.
        reweight: The position bias P or another correction, or one for every stage, or None.
        by: What the first stage ranks by: "both", or "attention" or "evolution" alone.
        since: The layer whose input is compared with that of the first of `layers`.
        cutoff: Width of the filter, as a share of half the grid's shorter side; 0 filters nothing.
        temperature: What the standardised change is divided by before the sigmoid.
        faithful: Let tokens after the prompt see in no layer what was dropped in one, as the
            authors' code for LLaVA does. The cache keeps it all the same, only hidden.
    """

    keep: int | float | tuple[int | float, ...]
    layers: tuple[int, ...] = (1, 11, 21)
    reweight: Reweight | tuple[Reweight, ...] | None = None
    by: By = "both"
    since: int = 0
    cutoff: float = 0.1
    temperature: float = 0.1
    faithful: bool = False

    name: ClassVar[str] = "CLSE"
    paper: ClassVar[str] = "arXiv 2606.24165"
    reweightable: ClassVar[bool] = True
    harmed: ClassVar[str | None] = BY_A_BLIND_LAYER

    def __post_init__(self) -> None:
        super().__post_init__()
        keep = self.keep if isinstance(self.keep, tuple) else (self.keep,) * len(self.layers)
        check_pyramid(keep, len(self.layers))
        check_choice(By, by=self.by)
        check_whole(0, since=self.since)
        if self.since >= self.layers[0]:
            raise BudgetError(
                f"since={self.since} is not before the first stage, at layer {self.layers[0]}; "
                "choose an earlier layer."
            )
        if not (math.isfinite(self.cutoff) and self.cutoff >= 0):
            raise ScoreError(f"cutoff must be a number of at least 0, not {self.cutoff!r}.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ScoreError(f"temperature must be a number above 0, not {self.temperature!r}.")

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> CLSE:
        """Stages where the authors have them in 32 layers, the first behind layer 0."""
        depth = shape.decoder.layers
        return cls(keep, tuple(sorted({max(1, round(depth * i / 32)) for i in (1, 11, 21)})))

    def reader(self) -> LastToken:
        """The last text token's attention."""
        return LastToken()

    def stages(self) -> Sequence[Stage]:
        """One stage before each of `layers`; the first looks back at layer `since`."""
        first, *others = super().stages()
        stages = [replace(first, earlier=self.since), *others]
        return [replace(stage, forgets=self.faithful) for stage in stages]

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse, besides what every staged method does, to forget what is in a recurrent state.

        Raises:
            UnsupportedModelError: faithful=True in a model with recurrent layers.
        """
        super().check(model, family)
        if self.faithful and any(family.recurrent(layer) for layer in family.layers(model)):
            raise UnsupportedModelError(
                "CLSE with faithful=True hides what was dropped from later tokens in every layer, "
                "which recurrent layers cannot; use faithful=False."
            )

    def remaining(self, visual: int) -> Sequence[int]:
        """Tokens that are left after every stage, of an image that came with so many."""
        if isinstance(self.keep, tuple) or len(self.layers) != len(_SHARES):
            return pyramid(self.keep, len(self.layers), visual)
        last = budget(self.keep, visual)
        return [min(visual, round(last * share / _SHARES[-1])) for share in _SHARES]

    def must_meet(self, stage: int) -> bool:
        """Numbers that were given one by one are all to be met."""
        return isinstance(self.keep, tuple) or super().must_meet(stage)

    def score(self, stage: int, view: View) -> Tensor:
        """The attention of the last text token, at first times the evolution factor."""
        attention = view.corrected(view.attention)
        if stage > 0 or self.by == "attention":
            return attention
        assert view.earlier is not None
        states = view.layout.gather(view.earlier), view.features
        before, after = (spectral_energy(x, view.layout, self.cutoff) for x in states)
        factor = evolution(before, after, view.layout.valid, self.temperature)
        return factor if self.by == "evolution" else factor * attention


def spectral_energy(states: Tensor, layout: Layout, cutoff: float) -> Tensor:
    """What a high-pass on the grid leaves of every visual token.

    Args:
        states: (I, t, C) states.
        layout: Where the tokens lie.
        cutoff: As in `CLSE`.

    Returns:
        (I, t), at least float32; that of a token of no place on the grid is the mean of the others,
        and 0 where not `layout.valid`.
    """
    states = widened(states)
    energy = states.new_zeros(states.shape[:2])
    tiles, patches = layout.shows()
    for i, image in enumerate(layout.images):
        placed = layout.valid[i] & (patches[i] >= 0)
        plane, row, column = _places(image, tiles[i], patches[i])
        for number in torch.unique(plane[placed]).tolist():
            some = (placed & (plane == number)).nonzero()[:, 0]
            rows, y = torch.unique(row[some], return_inverse=True)
            columns, x = torch.unique(column[some], return_inverse=True)
            grid = states[i, some].mean(0).repeat(len(rows), len(columns), 1)
            grid[y, x] = states[i, some]
            energy[i, some] = high_pass(grid, cutoff)[y, x]
        elsewhere = layout.valid[i] & ~placed
        energy[i] = torch.where(elsewhere, energy[i, placed].mean(), energy[i])
    return energy


def _places(image: Image, tile: Tensor, patch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(t,) the tile or frame of every token of an image, and its row and column there."""
    height, width = grid_of(image) or (1, image.count)
    place = patch % (height * width)
    frame = patch // (height * width)  # of a video that the tower takes in one piece
    return tile * (int(frame.max()) + 1) + frame, place // width, place % width


def high_pass(states: Tensor, cutoff: float) -> Tensor:
    """What a Gaussian high-pass leaves of states on a grid: the mean magnitude over channels.

    Args:
        states: (..., H, W, C) states.
        cutoff: Width of the filter in the frequencies, as a share of half the shorter side; 0
            filters nothing.

    Returns:
        (..., H, W) magnitudes.
    """
    if cutoff == 0:
        return states.abs().mean(-1)
    height, width = states.shape[-3:-1]
    y, x = (
        torch.arange(side, device=states.device, dtype=states.dtype) - side // 2
        for side in (height, width)
    )
    squares = y[:, None] ** 2 + x**2
    size = cutoff * min(height // 2, width // 2)
    # Of a grid too narrow for a width only the mean goes.
    gain = 1 - torch.exp(-squares / (2 * size**2)) if size else (squares > 0).to(states)
    dims = (-3, -2)
    spectrum = torch.fft.fftshift(torch.fft.fft2(states, dim=dims), dim=dims) * gain[..., None]
    left: Tensor = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=dims), dim=dims).abs()
    return left.mean(-1)


def evolution(before: Tensor, after: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """The evolution factor.

    Args:
        before: (I, t) spectral energies.
        after: (I, t) those of the same tokens, layers later.
        valid: (I, t) bool, False where an image has fewer tokens.
        temperature: As in `CLSE`.

    Returns:
        (I, t) factors from 0 to 1; arbitrary where not `valid`.
    """
    count = valid.sum(-1, keepdim=True)

    def total(values: Tensor) -> Tensor:
        return values.masked_fill(~valid, 0.0).sum(-1, keepdim=True)

    change = (after - before).abs() / (total(before) / count + before + _TINY)
    change = change.clamp(max=1.0)
    apart = change - total(change) / count
    spread = (total(apart.square()) / (count - 1).clamp(min=1)).sqrt()
    return (apart / (spread + _TINY) / temperature).sigmoid()
