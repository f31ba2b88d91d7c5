"""SparseVLM and SparseVLM+: stages inside the decoder, ranked by the words that matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pore.bias.rope import ROPE_FLOOR
from pore.bias.where import Positions
from pore.cost.shapes import ModelShape
from pore.engine.corrections import Reweight
from pore.engine.stages import Limit, Merges, Selection, Stage, View
from pore.errors import BudgetError, ScoreError
from pore.families.base import Family
from pore.methods._checks import check_choice
from pore.methods._sparsevlm import (
    Rated,
    RaterAttention,
    Raters,
    _curve,
    clusters,
    matrix_ranks,
    rate,
    recycle,
    rotary_prior,
    split,
    strongest_heads,
)
from pore.methods.pyramiddrop import pyramid
from pore.methods.staged import StagedPruner
from pore.tensors.gathering import pack, take
from pore.tensors.selection import budget, check_keep, top_k

# How many of 576 tokens the authors keep at each of three stages, by version and by the average #
# over the layers after which they name the setting.
_PUBLISHED: dict[int, dict[int, tuple[int, int, int]]] = {
    1: {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    2: {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}


@dataclass(frozen=True)
class RankBudget:
    """SparseVLM's budget as its paper describes it: redundant tokens are deleted.

    A stage with v visual tokens deletes scale · (v - rank) of them, truncated to a whole number.
    The rank is the rank of the raters' attention to the visual tokens, averaged over heads
    (arXiv 2410.04417, "sparsification level adaptation"). The released code has fixed numbers
    instead, so there is nothing to compare this with.

    Attributes:
        scale: λ, above 0 and at most 1.
    """

    scale: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and 0 < self.scale <= 1):
            raise BudgetError(f"The scale of a RankBudget is in (0, 1], not {self.scale!r}.")


@dataclass(frozen=True)
class SparseVLM(StagedPruner):
    """Keep the visual tokens that the relevant words attend to, in stages (arXiv 2410.04417).

    The words after an image that are most similar to it, by their embeddings, are its raters.
    Before each of `layers` visual tokens are ranked by the attention that the raters pay to them in
    the layer before, averaged over heads and raters. The best 30 % of the dropped tokens are merged
    into about a tenth as many, by density-peak clustering; they follow the kept ones, compete with
    them at later stages, and positions are numbered anew. With `reweight=P`, P divides the
    attention.

    Of several images in a prompt, each is pruned by itself, with the words after it. If no word
    stands out from the others, all are raters. If positions have several axes they stay as they
    are, and a merged token takes the place of the most central one merged into it.

    Attributes:
        keep: Tokens per image after the last stage (int), including merged ones, or the fraction
            (float); the stages before go down to it in equal ratios. A tuple gives every stage's
            number (or fraction of the original number) before merged ones are added, as in the
            authors' tables, see `published`. With a `RankBudget` the attention decides.
        layers: First layers that see fewer tokens. The authors count the layer before, whose
            output they prune: their 2, 6, 15 are 3, 7, 16.
        reweight: The position bias P or another correction, or one for every stage, or None.
        index: Where P is read: at a token's place in the image ("original"; for merged tokens at
            the end of the image), or at its distance to the text in the new numbering ("dense").
        faithful: A stage that should keep as many tokens as there are, or more, still drops one, as
            in the authors' code. By default it drops none, or refuses.
    """

    keep: int | float | tuple[int | float, ...] | RankBudget
    layers: tuple[int, ...] = (3, 7, 16)
    reweight: Reweight | tuple[Reweight, ...] | None = None
    index: Positions = "original"
    faithful: bool = False

    name: ClassVar[str] = "SparseVLM"
    paper: ClassVar[str] = "arXiv 2410.04417"
    reweightable: ClassVar[bool] = True
    merges: ClassVar[Merges | None] = "some"
    version: ClassVar[Literal[1, 2]] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.keep, tuple) and len(self.keep) != len(self.layers):
            raise BudgetError(
                f"keep={self.keep} has {len(self.keep)} numbers for {len(self.layers)} stages; "
                "give one for each, or the last alone."
            )
        if not isinstance(self.keep, RankBudget):
            for one in self.keep if isinstance(self.keep, tuple) else (self.keep,):
                check_keep(one)
        check_choice(Positions, index=self.index)

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> SparseVLM:
        """The authors' stages in a decoder of 32 layers, scaled to another depth."""
        layers = {max(1, round(layer * shape.decoder.layers / 32)) for layer in (3, 7, 16)}
        return cls(keep, tuple(sorted(layers)))

    @classmethod
    def published(cls, tokens: int, **settings: Any) -> SparseVLM:
        """A row of the authors' tables, for images of 576 tokens.

        Args:
            tokens: The average over the layers after which they name it: 192, 128, 96 or 64. They
                count a layer that prunes with the tokens that it leaves; the tokens that enter the
                layers of LLaVA-1.5 average 206.5, 145.4, 114.1 and 82.3 in SparseVLM, 206.8, 144.1,
                113.9 and 81.8 in SparseVLM+.
            settings: Other settings.

        Raises:
            BudgetError: There is no such row.
        """
        found = _PUBLISHED[cls.version].get(tokens)
        if found is None:
            raise BudgetError(
                f"The authors have no budget of {tokens} tokens for {cls.name}; choose from "
                f"{', '.join(map(str, _PUBLISHED[cls.version]))}, or give keep a number."
            )
        return cls(found, **settings)

    def reader(self) -> RaterAttention:
        """The attention of the raters."""
        prior = self.version == 2 and self.reweight is None
        return RaterAttention(prior=prior, matrix=isinstance(self.keep, RankBudget))

    def stages(self) -> Sequence[Stage]:
        """One stage before each of `layers`, ranked by the layer before."""
        return [
            replace(
                stage,
                prepare=self._rate,
                positions="dense" if self.version == 1 else "original",
                merges=self.version == 1,
                curve=_curve,
                bias_at=self.index,
            )
            for stage in super().stages()
        ]

    def remaining(self, visual: int) -> Sequence[int]:
        """Tokens left after every stage, including merged ones.

        Raises:
            BudgetError: The image has too few, or the number depends on its attention.
        """
        if isinstance(self.keep, RankBudget):
            raise BudgetError(
                "How many tokens a RankBudget keeps depends on the image; run it and see."
            )
        found = [visual]
        for stage in range(len(self.layers)):
            found.append(sum(self._share(stage, visual, found[-1])))
        return found[1:]

    def _share(self, stage: int, visual: int, here: int, rank: int = 0) -> tuple[int, int]:
        """How many of `here` tokens a stage keeps, and into how many it merges others.

        Args:
            stage: Which stage.
            visual: Number of tokens that the image came with.
            here: Number of tokens that are left of it.
            rank: The rank of the raters' attention to them, for a `RankBudget`.
        """
        if isinstance(self.keep, RankBudget):
            kept = max(1, here - int(self.keep.scale * (here - rank)))
        elif isinstance(self.keep, tuple):
            one = self.keep[stage]
            kept = one if isinstance(one, int) else budget(one, visual)
            if self.faithful:
                kept = min(kept, max(1, here - 1))
        else:
            total = pyramid(budget(self.keep, visual), len(self.layers), visual)[stage]
            if not self.must_meet(stage):  # a method before this one may have left fewer
                total = min(total, here)
            if self.version == 1:
                return split(total, here)
            kept = total
        if kept > here:
            raise BudgetError(
                f"Stage {stage + 1} should keep {kept} visual tokens, but only {here} are left."
            )
        return kept, clusters(here - kept) if self.version == 1 else 0

    def _rate(self, view: View) -> Raters:
        """Find the raters of every image, once for a prompt."""
        layout, states = view.layout, view.hidden_states
        index, valid = pack(layout.text_after)
        text = states[layout.rows[:, None], index]
        chosen = rate(view.features, layout.valid, text, valid)
        chosen = chosen | (valid & ~chosen.any(-1, keepdim=True))
        places, valid = pack(chosen)
        last = layout.last[layout.rows, None]
        index = torch.where(valid, index.gather(1, places), last)
        prior = None
        if self.version == 2 and self.reweight is None:
            assert view.rotary is not None
            prior = rotary_prior(view.rotary, states)
            if not self.faithful:
                prior = prior.clamp(min=ROPE_FLOOR * prior[0])
        return Raters(index, valid, states.shape[1], prior)

    def _select(self, stage: int, view: View) -> Selection:
        layout, rated = view.layout, view.attention
        assert isinstance(rated, Rated)
        scores = self.score(stage, view)
        counts = layout.counts
        ranks = [0] * len(counts) if rated.matrix is None else matrix_ranks(rated.matrix, counts)
        shares = []
        for image, here, own in zip(layout.images, counts, ranks, strict=True):
            try:
                shares.append(self._share(stage, len(image.columns), here, own))
            except BudgetError as error:
                raise BudgetError(f"Image {image.index} of sample {image.row}: {error}") from None
        kept, merged = (list(numbers) for numbers in zip(*shares, strict=True))
        keep = top_k(scores, kept, layout.valid)
        if not any(merged):
            return Selection(keep)
        return recycle(view.features, layout.raster, scores, keep, layout.valid, merged, view.dense)

    def score(self, stage: int, view: View) -> Tensor:
        """The raters' attention to every token, averaged over heads, divided by P if given."""
        rated: Rated = view.attention
        heads = rated.attention if rated.corrected is None else rated.corrected
        if view.correction is not None:
            # Head by head, because corrected scores decide which heads count.
            heads = torch.stack([view.corrected(head) for head in heads.unbind(1)], 1)
        return self._chosen(heads).mean(1)

    def _chosen(self, heads: Tensor) -> Tensor:
        """The heads of (I, H, t) that count."""
        return heads


@dataclass(frozen=True)
class SparseVLMPlus(SparseVLM):
    """SparseVLM+, the second version of the released code of SparseVLM (arXiv 2410.04417).

    As `SparseVLM`, but the raters' attention is divided by what RoPE alone gives at every distance,
    only the `heads` that then look at the image most are averaged, nothing is merged and positions
    are kept. With `reweight=P`, P replaces the prior of RoPE.

    Attributes:
        keep: As in `SparseVLM`.
        layers: As in `SparseVLM`.
        reweight: The position bias P, or one for every stage, in place of the prior of RoPE.
        index: As in `SparseVLM`; as positions are kept, "original" is the right choice.
        faithful: As in `SparseVLM`, and scores are divided by the prior even where it is zero or
            negative, which reverses the ranking (for heads of 128, at distances from 1707 on). By
            default the prior is at least a tenth of its value at distance 0.
        heads: Number of heads that are averaged, 14 in the authors' code; all if there are fewer.
    """

    heads: int = 14

    name: ClassVar[str] = "SparseVLM+"
    merges: ClassVar[Merges | None] = None
    version: ClassVar[Literal[1, 2]] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1:
            raise ScoreError(f"heads={self.heads} leaves no head to average; ask for at least 1.")

    def limits(self, family: Family) -> list[Limit]:
        """The limits of `SparseVLM`, and positions on several axes without `reweight`."""
        found = super().limits(family)
        if self.reweight is None and family.mrope:
            found.append(
                Limit(
                    "its prior needs positions on one axis, but here they have several. Use "
                    "SparseVLM, or calibrate and give reweight."
                )
            )
        return found

    def _chosen(self, heads: Tensor) -> Tensor:
        strongest = strongest_heads(heads, self.heads)
        return take(heads, strongest)
