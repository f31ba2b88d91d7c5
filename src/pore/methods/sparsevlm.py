"""SparseVLM and SparseVLM+: stages inside the decoder, ranked by the words that matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pore.attention import LayerAttention
from pore.bias import ROPE_FLOOR
from pore.errors import BudgetError, ScoreError
from pore.families import Family
from pore.methods._stages import bias_of_each, check_layers, check_stages, freeze
from pore.methods.pyramiddrop import pyramid
from pore.pruner import Index, Limit, Pruner, Selection, Stage, View
from pore.selection import budget, check_keep, top_k

if TYPE_CHECKING:
    from pore.bias import PositionBias
    from pore.shapes import ModelShape

# What the authors keep of 576 tokens at each of three stages, by version and by the average over
# the layers that they name it after.
_PUBLISHED: dict[int, dict[int, tuple[int, int, int]]] = {
    1: {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    2: {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
_RECYCLED = 0.3  # of the dropped tokens, those of the highest scores are merged
_TO_ONE = 10  # about so many into one


@dataclass(frozen=True)
class RankBudget:
    """SparseVLM's budget as its paper describes it: what the attention holds twice is deleted.

    A stage with v visual tokens deletes scale · (v - rank) of them, cut off to a whole number,
    where the rank is that of the attention of the raters to the visual tokens, averaged over heads
    (arXiv 2410.04417, "sparsification level adaptation"). The released code has fixed numbers in
    its place, so there is nothing to compare this with.

    Attributes:
        scale: λ, above 0 and at most 1.
    """

    scale: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and 0 < self.scale <= 1):
            raise BudgetError(f"The scale of a RankBudget is in (0, 1], not {self.scale!r}.")


@dataclass(frozen=True)
class SparseVLM(Pruner):
    """Keep the visual tokens that the relevant words attend to, in stages (arXiv 2410.04417).

    The words behind an image that are most alike to it, by their embeddings, are its raters. Before
    each of `layers` visual tokens are ranked by the attention that the raters pay them in the layer
    before, averaged over heads and raters. The best 30 % of what is dropped are merged into about
    a tenth as many tokens, by density-peak clustering; they follow the kept ones, compete with them
    at later stages, and positions are numbered anew. With `reweight=P`, P divides the attention.

    Several images in a prompt are pruned each by itself, with the words behind it. Where no word
    stands out from the others, all are raters. In models whose positions have several axes these
    stay as they are, and a merged token takes the place of the most central one merged into it.

    Attributes:
        keep: Tokens per image behind the last stage (int), merged ones included, or the fraction
            (float); the stages before come down to it in equal ratios. A tuple gives every stage's
            number (or fraction of the image's own) before merged ones are added, as the authors'
            tables do, see `published`. A `RankBudget` lets the attention decide.
        layers: First layers that see fewer tokens. The authors count the layer before, whose
            output they prune: their 2, 6, 15 are 3, 7, 16.
        reweight: The position bias P, or one for every stage, or None.
        index: Where P is read: at a token's place in the image ("original", merged tokens at the
            end of it), or "dense" at its distance to the text in the new numbering.
        faithful: A stage that is to keep as many tokens as there are, or more, drops one all the
            same, as in the authors' code; without, it drops none, or refuses.
    """

    keep: int | float | tuple[int | float, ...] | RankBudget
    layers: tuple[int, ...] = (3, 7, 16)
    reweight: PositionBias | tuple[PositionBias, ...] | None = None
    index: Index = "original"
    faithful: bool = False

    name: ClassVar[str] = "SparseVLM"
    source: ClassVar[str] = "arXiv 2410.04417"
    reweightable: ClassVar[bool] = True
    version: ClassVar[Literal[1, 2]] = 1

    def __post_init__(self) -> None:
        freeze(self, "keep", "layers", "reweight")
        check_layers(self.layers)
        if isinstance(self.keep, tuple) and len(self.keep) != len(self.layers):
            raise BudgetError(
                f"keep={self.keep} has {len(self.keep)} numbers for {len(self.layers)} stages; "
                "give one for each, or the last alone."
            )
        if not isinstance(self.keep, RankBudget):
            for one in self.keep if isinstance(self.keep, tuple) else (self.keep,):
                check_keep(one)
        bias_of_each(self.reweight, len(self.layers))
        if self.index not in ("original", "dense"):
            raise ScoreError(f"index must be 'original' or 'dense', not {self.index!r}.")

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> SparseVLM:
        """The authors' stages in a decoder of 32 layers, scaled to another depth."""
        layers = {max(1, round(layer * shape.decoder.layers / 32)) for layer in (3, 7, 16)}
        return cls(keep, tuple(sorted(layers)))

    @classmethod
    def published(cls, tokens: int, **settings: Any) -> SparseVLM:
        """A row of the authors' tables, for images of 576 tokens.

        Args:
            tokens: The average over the layers that they name it after: 192, 128, 96 or 64. It
                counts a layer that prunes by what it leaves; what enters the layers of LLaVA-1.5
                averages 206.5, 145.4, 114.1 and 82.3 in SparseVLM, 206.8, 144.1, 113.9 and 81.8 in
                SparseVLM+.
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

    def stages(self) -> Sequence[Stage]:
        """One stage before each of `layers`, ranked by the layer before."""
        prior = self.version == 2 and self.reweight is None
        reader = RaterAttention(prior=prior, matrix=isinstance(self.keep, RankBudget))
        return [
            Stage(
                layer,
                partial(self._select, i),
                reader,
                prepare=self._rate,
                positions="dense" if self.version == 1 else "original",
                merges=self.version == 1,
                curve=_curve,
            )
            for i, layer in enumerate(self.layers)
        ]

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse what does not fit the decoder, and biases measured under other conditions."""
        biases = bias_of_each(self.reweight, len(self.layers))
        check_stages(self.stages(), biases, family, model)

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image that enter every decoder layer.

        Raises:
            BudgetError: The image has too few, or the number depends on its attention.
        """
        if isinstance(self.keep, RankBudget):
            raise BudgetError("What a RankBudget keeps depends on the image; run it and see.")
        found = [visual] * layers
        for i, layer in enumerate(self.layers):
            here = sum(self._share(i, visual, found[-1]))
            found[layer:] = [here] * (layers - layer)
        return found

    def _share(self, stage: int, visual: int, here: int, rank: int = 0) -> tuple[int, int]:
        """How many of `here` tokens a stage keeps, and into how many it merges others.

        Args:
            stage: Which stage.
            visual: Tokens that the image came with.
            here: Tokens that it has left.
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
            if stage < len(self.layers) - 1:  # a method before this one may have left fewer
                total = min(total, here)
            if self.version == 1:
                return split(total, here)
            kept = total
        if kept > here:
            raise BudgetError(
                f"Stage {stage + 1} is to keep {kept} visual tokens, but {here} are left."
            )
        return kept, clusters(here - kept) if self.version == 1 else 0

    def _rate(self, view: View) -> Raters:
        """The raters of every image, once for a prompt."""
        layout, states = view.layout, view.hidden_states
        index, valid = _packed(layout.text_behind)
        text = states[layout.rows[:, None], index]
        chosen = rate(view.features, layout.valid, text, valid)
        chosen = chosen | (valid & ~chosen.any(-1, keepdim=True))
        places, valid = _packed(chosen)
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
        scores = self._scores(stage, view, rated)
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

    def _scores(self, stage: int, view: View, rated: Rated) -> Tensor:
        """(I, t) what ranks the visual tokens."""
        heads = rated.attention if rated.corrected is None else rated.corrected
        bias = bias_of_each(self.reweight, len(self.layers))[stage]
        if bias is not None:
            ones = torch.ones_like(heads[:, 0])
            heads = heads * view.reweighted(ones, bias, self.index)[:, None]
        return self._chosen(heads).mean(1)

    def _chosen(self, heads: Tensor) -> Tensor:
        """The heads that count, of (I, H, t)."""
        return heads


@dataclass(frozen=True)
class SparseVLMPlus(SparseVLM):
    """SparseVLM+, the second version of the released code of SparseVLM (arXiv 2410.04417).

    As `SparseVLM`, but the raters' attention is divided by what RoPE alone makes of the distance,
    only the `heads` that then look at the image most are averaged, nothing is merged and positions
    are kept. With `reweight=P`, P stands in for the prior of RoPE.

    Attributes:
        keep: As in `SparseVLM`.
        layers: As in `SparseVLM`.
        reweight: The position bias P, or one for every stage, in place of the prior of RoPE.
        index: As in `SparseVLM`; positions being kept, "original" is the place for P.
        faithful: As in `SparseVLM`, and the prior counts even where it is zero or negative, which
            turns the ranking round (for heads of 128, at distances from 1707 on); without, it goes
            no lower than a tenth of its value at distance 0.
        heads: Heads that are averaged, 14 in the authors' code; all where there are fewer.
    """

    heads: int = 14

    name: ClassVar[str] = "SparseVLM+"
    version: ClassVar[Literal[1, 2]] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1:
            raise ScoreError(f"heads={self.heads} leaves no head to average; ask for at least 1.")

    def limits(self, family: Family) -> list[Limit]:
        """Those of `SparseVLM`, and positions on several axes without `reweight`."""
        found = super().limits(family)
        if self.reweight is None and family.mrope:
            found.append(
                Limit(
                    "its prior is of positions on one axis, but here they have several. Use "
                    "SparseVLM, or calibrate and give reweight."
                )
            )
        return found

    def _chosen(self, heads: Tensor) -> Tensor:
        strongest = strongest_heads(heads, self.heads)
        return heads.gather(1, strongest[..., None].expand(-1, -1, heads.shape[-1]))


@dataclass(frozen=True)
class Raters:
    """The words that rate each of I images.

    Attributes:
        index: (I, R) their positions in the prompt as it enters the decoder; the last token where
            an image has fewer.
        valid: (I, R) bool, False there.
        length: L, positions in that prompt.
        prior: (L,) what RoPE alone gives at every distance, to divide attention by, or None.
    """

    index: Tensor
    valid: Tensor
    length: int
    prior: Tensor | None


@dataclass(frozen=True)
class Rated:
    """What the raters of I images say of their visual tokens.

    Attributes:
        attention: (I, H, t) attention of every head, averaged over the raters; 0 where there is no
            token.
        corrected: The same, divided by the prior before averaging, or None.
        matrix: (I, R, t) attention of every rater, averaged over heads, or None.
    """

    attention: Tensor
    corrected: Tensor | None = None
    matrix: Tensor | None = None


@dataclass(frozen=True)
class RaterAttention:
    """Reads the attention of the raters to the visual tokens of their image.

    Attributes:
        prior: Whether to divide by the prior of RoPE as well.
        matrix: Whether the attention of every rater is asked for.
    """

    prior: bool = False
    matrix: bool = False

    normalize: ClassVar[str] = "raters"

    def __call__(self, attention: LayerAttention) -> Rated:
        """What the raters, found by the stage's `prepare`, say."""
        layout, raters = attention.layout, attention.memory
        device = attention.query.device
        index, valid = raters.index.to(device), raters.valid.to(device)
        # Words are never dropped, so that each is still somewhere.
        origin = attention.origin
        slots = torch.arange(origin.shape[1], device=device).expand_as(origin)
        here = slots.new_zeros(origin.shape[0], raters.length).scatter_(1, origin, slots)
        weights = attention.logits(here[layout.rows[:, None], index]).softmax(-1)
        columns = attention.columns[:, None, None].expand(*weights.shape[:3], -1)
        weights = weights.gather(-1, columns)
        inside = valid[:, None, :, None] & layout.valid[:, None, None]
        weights = weights.masked_fill(~inside, 0.0)
        raters_of = valid.sum(-1)[:, None, None]
        corrected = None
        if self.prior:
            places = origin[layout.rows[:, None], layout.columns]
            distance = (index[:, :, None] - places[:, None]).clamp(min=0)
            fair = weights / raters.prior.to(weights)[distance][:, None]
            corrected = fair.masked_fill(~inside, 0.0).sum(2) / raters_of
        matrix = weights.mean(1) if self.matrix else None
        return Rated(weights.sum(2) / raters_of, corrected, matrix)


def _curve(rated: Rated) -> Tensor:
    return rated.attention.mean(1)


def _packed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(I, R) the positions marked in every row of (I, L), ascending, and which of them are."""
    counts = mask.sum(-1, keepdim=True)
    index = (~mask).long().argsort(dim=-1, stable=True)[:, : int(counts.max())]
    return index, torch.arange(index.shape[1], device=mask.device) < counts


def rate(visual: Tensor, valid: Tensor, text: Tensor, words: Tensor) -> Tensor:
    """Which words are raters: those more alike to the image than the average word.

    Every visual token spreads a softmax over the words by its dot products with them; a word's
    weight is the mean over the visual tokens.

    Args:
        visual: (I, t, D) embeddings of the visual tokens.
        valid: (I, t) bool, False where a smaller image is filled up.
        text: (I, T, D) embeddings of the words.
        words: (I, T) bool, False where a shorter text is filled up.

    Returns:
        (I, T) bool.
    """
    dtype = torch.promote_types(visual.dtype, torch.float32)
    logits = torch.matmul(visual.to(dtype), text.to(dtype).mT)
    weights = logits.masked_fill(~words[:, None], -torch.inf).softmax(-1)
    weights = weights.masked_fill(~valid[..., None], 0.0).sum(1) / valid.sum(-1, keepdim=True)
    mean = weights.sum(-1, keepdim=True) / words.sum(-1, keepdim=True)
    return (weights > mean) & words


def rotary_prior(rotary: Any, states: Tensor) -> Tensor:
    """The scaled dot product of an all-ones query and key after RoPE, by their distance.

    Args:
        rotary: Makes rotary tables for states (B, m, D) at positions (B, m).
        states: (B, L, D).

    Returns:
        (L,) the prior at distances 0 to L - 1, at least float32; √d at 0 for heads of d.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    distance = torch.arange(states.shape[1], device=states.device)[None]
    tables = rotary(states[:1, :, :1].to(dtype), distance)
    alone = isinstance(tables, Tensor)  # a complex number for every two dimensions (Llama 4)
    cosines: Tensor = tables.real.repeat_interleave(2, -1) if alone else tables[0]
    width = cosines.shape[-1]
    return cosines[0].sum(-1) / math.sqrt(width)


def strongest_heads(scores: Tensor, count: int) -> Tensor:
    """The heads that give the visual tokens most.

    Args:
        scores: (I, H, t) scores of every head; 0 where there is no token.
        count: Heads to choose.

    Returns:
        (I, min(count, H)) heads, the strongest first.
    """
    return scores.sum(-1).argsort(dim=-1, descending=True, stable=True)[:, :count]


def matrix_ranks(matrix: Tensor, counts: Sequence[int]) -> list[int]:
    """The rank of every image's matrix.

    Args:
        matrix: (I, R, t) of zeros where an image has fewer rows or columns.
        counts: Columns of each.

    Returns:
        I ranks: singular values above the largest times the columns times the type's precision.
    """
    limit = torch.tensor(counts, device=matrix.device) * torch.finfo(matrix.dtype).eps
    found: list[int] = torch.linalg.matrix_rank(matrix.nan_to_num(), rtol=limit).tolist()
    return found


def clusters(dropped: int) -> int:
    """How many tokens come of those that are dropped."""
    return _pool(dropped) // _TO_ONE + 1 if dropped else 0


def _pool(dropped: int) -> int:
    """How many of the dropped tokens are merged."""
    return int(dropped * _RECYCLED) + 1 if dropped else 0


def split(total: int, available: int) -> tuple[int, int]:
    """How many tokens to keep so that, with what becomes of the others, there are `total`.

    Args:
        total: Tokens to be left, at least 1.
        available: Tokens there are.

    Returns:
        Tokens to keep, at least 1 and as many as can be, and the clusters to merge others into:
        `clusters` of them, or fewer where even one kept token would leave too many.

    Raises:
        BudgetError: There are fewer than `total`.
    """
    if budget(total, available) == available:
        return available, 0
    for kept in range(total - 1, 0, -1):
        if kept + clusters(available - kept) == total:
            return kept, total - kept
    return 1, total - 1


def recycle(
    features: Tensor,
    raster: Tensor,
    scores: Tensor,
    keep: Tensor,
    valid: Tensor,
    merged: Sequence[int],
    behind: bool = True,
) -> Selection:
    """Merge the best of the dropped tokens.

    Args:
        features: (I, t, D) states of the visual tokens.
        raster: (I, t) the original token that each stands for.
        scores: (I, t) their scores.
        keep: (I, t) bool, the tokens kept.
        valid: (I, t) bool, False where a smaller image is filled up.
        merged: Tokens to make of the dropped ones of each image; 0 makes none.
        behind: Whether the merged tokens come behind the kept ones, the most central first, and
            stand for no patch; or each takes the place of the most central one merged into it, for
            models in which tokens keep their positions.

    Returns:
        The kept tokens and the merged ones.
    """
    dropped = valid & ~keep
    pools = [_pool(count) for count in dropped.sum(-1).tolist()]
    order = scores.masked_fill(~dropped, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    order = order[:, : max(pools)]
    slots = torch.arange(keep.shape[1], device=keep.device)
    inside = slots[: order.shape[1]] < torch.tensor(pools, device=keep.device)[:, None]
    x = _take(features, order)
    cluster, centres = density_peaks(x, merged, inside)
    new = merge(x, cluster, inside, max(merged))

    kept, added = keep.sum(-1, keepdim=True), torch.tensor(merged, device=keep.device)[:, None]
    if not behind:
        real = slots[: new.shape[1]] < added
        rows = torch.arange(len(keep), device=keep.device)[:, None].expand_as(real)[real]
        places = order.gather(1, centres)[real]
        states = features.to(new.dtype, copy=True)
        states[rows, places] = new[real]
        stays = keep.index_put((rows, places), torch.ones_like(places, dtype=torch.bool))
        return Selection(stays, states)
    old = (~keep).long().argsort(dim=-1, stable=True)
    stays = slots < kept
    number = (slots - kept).clamp(0, new.shape[1] - 1)
    states = torch.where(stays[..., None], _take(features, old).to(new.dtype), _take(new, number))
    return Selection(slots < kept + added, states, raster.gather(1, old).masked_fill(~stays, -1))


@torch.no_grad()
def density_peaks(
    x: Tensor, counts: Sequence[int], valid: Tensor, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cluster by density peaks with the nearest neighbours as density (DPC-KNN).

    A token is dense if its c nearest, itself included, are near. The centres are the c tokens that
    are dense and far from denser ones; each other token joins the nearest centre.

    Args:
        x: (I, m, D) features.
        counts: Clusters c of every image, at most as many as it has tokens.
        valid: (I, m) bool, True at the first of them, False where an image has fewer.
        noise: (I, m) in [0, 1): the authors add a millionth of such draws to the density, which
            then decides between equals (with two clusters, any two tokens that are each other's
            nearest). None takes the first of equals instead.

    Returns:
        (I, m) the cluster of every token, numbered by how central its centre is; and the centres,
        (I, max(counts)), of which the first c of an image count.
    """
    m, count = x.shape[1], torch.tensor(counts, device=x.device)[:, None]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # Pair by pair, so that distances are the same both ways, and equal densities are equal.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance / math.sqrt(x.shape[-1])
    both = valid[:, :, None] & valid[:, None]
    slots = torch.arange(m, device=x.device)

    near = distance.masked_fill(~both, torch.inf).sort(-1).values
    near = near.masked_fill(slots >= count[..., None], 0.0)
    density = -near.square().sum(-1) / count.clamp(min=1)  # its logarithm
    if noise is not None:
        density = (density.exp() + noise * 1e-6).log()
    one, other = density[:, :, None], density[:, None]
    denser = (other > one) | ((other == one) & (slots < slots[:, None]))
    farthest = distance.masked_fill(~both, 0.0).amax((1, 2))[:, None]
    gap = distance.masked_fill(~(denser & both), torch.inf).amin(-1)
    gap = torch.where(gap.isinf(), farthest, gap)

    peak = (gap.log() + density).masked_fill(~valid, -torch.inf)
    centres = peak.argsort(dim=-1, descending=True, stable=True)[:, : max(counts)]
    numbers = slots[: centres.shape[1]].expand_as(centres)
    real = numbers < count
    to = distance.gather(2, centres[:, None].expand(-1, m, -1))
    nearest = to.masked_fill(~real[:, None], torch.inf).sort(dim=-1, stable=True).indices[..., 0]
    own = torch.where(real, numbers, nearest.gather(1, centres))
    return nearest.scatter(1, centres, own), centres


def merge(x: Tensor, cluster: Tensor, valid: Tensor, count: int) -> Tensor:
    """The mean of every cluster.

    Args:
        x: (I, m, D) features.
        cluster: (I, m) the cluster of each.
        valid: (I, m) bool, False where an image has fewer.
        count: Clusters of the image that has most.

    Returns:
        (I, count, D) means, at least float32; 0 for a cluster without tokens.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    numbers = torch.arange(count, device=x.device)
    member = ((cluster[:, None] == numbers[:, None]) & valid[:, None]).to(dtype)
    x = x.to(dtype).masked_fill(~valid[..., None], 0.0)
    return torch.matmul(member, x) / member.sum(-1, keepdim=True).clamp(min=1)


def _take(states: Tensor, index: Tensor) -> Tensor:
    """(I, k, D) the states (I, t, D) at index (I, k)."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
