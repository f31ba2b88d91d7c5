"""TopV: visual tokens ranked by optimal transport through a layer, from the paper's description."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pore.engine.stages import Selection, Stage, View
from pore.errors import ScoreError
from pore.layout import Image, Layout
from pore.methods._checks import check_choice
from pore.methods.scorer import ScoredPruner
from pore.tensors.gathering import widened
from pore.tensors.selection import top_k

Marginals = Literal["norm", "uniform"]


@dataclass(frozen=True)
class TopV(ScoredPruner):
    """Keep the visual tokens that contribute most to a layer's output (arXiv 2503.18278).

    EXPERIMENTAL. There is no code of the authors, and only the paper's abstract and a figure's
    caption were available; an unofficial reading of the paper filled some gaps. What is not known
    is a setting, its default is a guess, and no result of the paper is claimed.

    Before layer K a transport plan P is computed between the visual tokens that entered layer
    K - 1, the sources, and the same tokens in that layer's output, the targets; a source's
    importance is the sum of its row. The paper takes the targets inside layer K - 1, after its
    second norm; here they are the layer's output. The cost of a pair is the squared distance of the
    states, 1 - exp(-d² / 2 sigma²) for tokens d patches apart, and the source's distance from the
    centre of the image, each scaled to 0 to 1, times `feature`, `spatial` and `central`.

    The plan is scaled (Sinkhorn, in the log domain) to the targets' marginal, then in turn to the
    sources' and the targets'. If it were scaled to the sources' marginal last, its row sums would
    be that marginal whatever the cost. After many `iterations` they are that too, so the cost ranks
    tokens only if there are few. If it were scaled to the sources' first, a cost that depends only
    on the source would cancel out.

    Exactly `keep` tokens stay; a share `recover` of them is taken evenly, in the order of the
    prompt, from those that importance would drop. Kept tokens keep their positions. Patches of
    images in tiles have their place in the whole image. If a family does not say where tokens lie
    (video, tiles in an unknown order), all lie at one place, so that only the states count.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float), including the recovered
            ones.
        layer: K, the 0-based index of the first pruned layer.
        feature: Weight of the distance of states.
        spatial: Weight of the distance of a pair on the grid.
        central: Weight of the distance from the centre.
        sigma: Reach of the distance on the grid, in patches.
        epsilon: Entropic regularisation; the cost is divided by it.
        iterations: Number of scalings to the targets' marginal.
        marginals: The weights of sources and targets: the "norm" of their states, or "uniform" for
            equal weights.
        recover: Share of the kept tokens that is taken evenly from the others.
    """

    feature: float = 1.0
    spatial: float = 1.0
    central: float = 0.01
    sigma: float = 10.0
    epsilon: float = 0.1
    iterations: int = 3
    marginals: Marginals = "norm"
    recover: float = 0.25

    name: ClassVar[str] = "TopV"
    paper: ClassVar[str] = "from the description of arXiv 2503.18278; no code to compare with"
    experimental: ClassVar[bool] = True
    earliest: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("feature", "spatial", "central"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ScoreError(f"{name} is a weight of at least 0, not {getattr(self, name)!r}.")
        for name in ("sigma", "epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ScoreError(f"{name} must be above 0, not {getattr(self, name)!r}.")
        if type(self.iterations) is not int or self.iterations < 1:
            raise ScoreError(f"iterations={self.iterations!r} must be a whole number from 1 on.")
        check_choice(Marginals, marginals=self.marginals)
        if not 0 <= self.recover <= 1:
            raise ScoreError(f"recover is a share from 0 to 1, not {self.recover!r}.")

    def stages(self) -> Sequence[Stage]:
        """One stage before layer K, and one before K - 1 that only notes the states."""
        noting = [Stage(self.layer - 1, _note, prepare=_notes)] if self.layer > 1 else []
        return [*noting, *(replace(stage, prepare=_notes) for stage in super().stages())]

    def score(self, view: View) -> Tensor:
        """What every token, as a source, gives to all targets."""
        valid, target = view.layout.valid, view.features
        source = view.memory["states"].to(target.device)
        places, centre = coordinates(view.layout)
        away = (places - centre[:, None]).norm(dim=-1)[..., None]
        cost = (
            self.feature * scaled(squared_distance(source, target), valid)
            + self.spatial * scaled(1 - _near(places, self.sigma), valid)
            + self.central * scaled(away, valid)
        )
        plan = transport(
            cost / self.epsilon,
            self._marginal(source, valid),
            self._marginal(target, valid),
            valid,
            self.iterations,
        )
        return plan.sum(-1)

    def choose(self, view: View, scores: Tensor) -> Selection:
        """The best, and some of the others at even distances."""
        valid = view.layout.valid
        counts = torch.tensor(view.budget(self.keep), device=valid.device)
        even = (counts * self.recover).round().long()
        best = top_k(scores, counts - even, valid)
        return Selection(best | evenly(valid & ~best, even))

    def _marginal(self, states: Tensor, valid: Tensor) -> Tensor:
        weight: Tensor = widened(states).norm(dim=-1)
        if self.marginals == "uniform":
            weight = torch.ones_like(weight)
        # A state of zeros gets a tiny weight, because 0 has no logarithm.
        weight = weight.clamp(min=torch.finfo(weight.dtype).tiny ** 0.5)
        weight = weight.masked_fill(~valid, 0.0)
        return weight / weight.sum(-1, keepdim=True)


def _notes(view: View) -> dict[str, Tensor]:
    """Where the states that enter layer K - 1 are noted; at first, those that enter the decoder."""
    return {"states": view.features}


def _note(view: View) -> Selection:
    view.memory["states"] = view.features
    return Selection(view.layout.valid)


def coordinates(layout: Layout) -> tuple[Tensor, Tensor]:
    """Where every visual token lies in its image.

    Args:
        layout: Where the visual tokens lie in the sequence.

    Returns:
        (I, t, 2) row and column, in patches of the image in one piece, arbitrary where not `valid`,
        and (I, 2) the centre of every image; all at one place where an image has no grid.
    """
    places: list[Tensor] = []
    centres: list[tuple[float, float]] = []
    for i, image in enumerate(layout.images):
        patch = layout.places(image.count)[i].clamp(0, image.count - 1)
        found, centre = _lie(image, patch)
        places.append(found)
        centres.append(centre)
    where = torch.stack(places)
    return where, torch.tensor(centres, dtype=where.dtype, device=where.device)


def _lie(image: Image, patch: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """(t, 2) places of patches of one image, and its centre."""
    if image.grid is not None:
        height, width = image.grid
        where = torch.stack([patch // width, patch % width], -1).float()
        return where, ((height - 1) / 2, (width - 1) / 2)
    tiling = image.tiling
    side = 0 if tiling is None else math.isqrt(tiling.patches)
    if tiling is None or tiling.grid is None or side**2 != tiling.patches:
        return patch.new_zeros(len(patch), 2, dtype=torch.float32), (0.0, 0.0)
    slot = torch.tensor(tiling.shown, device=patch.device)[patch]
    tile, inside = slot // tiling.patches, slot % tiling.patches
    where = torch.stack([inside // side, inside % side], -1).float()
    rows, columns = tiling.grid
    # Tile 0 is the whole image; the others share it, in rows.
    first = torch.stack([(tile - 1) // columns, (tile - 1) % columns], -1) * side
    share = torch.tensor([rows, columns], device=patch.device)
    whole = (first + where + 0.5) / share - 0.5
    return torch.where((tile > 0)[:, None], whole, where), ((side - 1) / 2, (side - 1) / 2)


def _near(places: Tensor, sigma: float) -> Tensor:
    """(I, t, t) how near pairs of tokens are, 1 at the same place."""
    apart = (places[:, :, None] - places[:, None]).square().sum(-1)
    return torch.exp(-apart / (2 * sigma**2))


def squared_distance(source: Tensor, target: Tensor) -> Tensor:
    """Squared Euclidean distance of every source from every target.

    Args:
        source: (I, t, D) states.
        target: (I, t, D) states.

    Returns:
        (I, t, t) distances, at least float32.
    """
    one = widened(source)
    other = target.to(one.dtype)
    squares = one.square().sum(-1)[:, :, None] + other.square().sum(-1)[:, None]
    return (squares - 2 * torch.matmul(one, other.mT)).clamp(min=0)


def scaled(cost: Tensor, valid: Tensor) -> Tensor:
    """Costs of each image brought to 0 to 1; all 0 where they are all the same.

    Args:
        cost: (I, t, t or 1) costs by source and target.
        valid: (I, t) bool, False where a smaller image is filled up.

    Returns:
        The costs, in the same shape; arbitrary but finite where not `valid`.
    """
    pairs = valid[:, :, None] & (valid[:, None] if cost.shape[-1] > 1 else valid[:, :1, None])
    least = cost.masked_fill(~pairs, torch.inf).amin((1, 2), keepdim=True)
    most = cost.masked_fill(~pairs, -torch.inf).amax((1, 2), keepdim=True)
    reach = torch.where(most > least, most - least, torch.ones_like(most))
    return ((cost - least) / reach).masked_fill(~pairs, 0.0)


def transport(
    cost: Tensor, source: Tensor, target: Tensor, valid: Tensor, iterations: int
) -> Tensor:
    """Entropic transport by Sinkhorn's scalings, in the log domain, ending on the targets.

    Args:
        cost: (I, t, t) costs by source and target, over the regularisation.
        source: (I, t) what every source is to give, summing to 1.
        target: (I, t) what every target is to get, summing to 1.
        valid: (I, t) bool, False where a smaller image is filled up.
        iterations: Number of scalings to the targets, with one to the sources between any two.

    Returns:
        (I, t, t) plan; its columns sum to `target`, 0 where not `valid`.
    """
    log = (-cost).masked_fill(~(valid[:, :, None] & valid[:, None]), -torch.inf)
    gives, gets = source.log()[..., None], target.log()[:, None]
    rows, columns = valid[..., None], valid[:, None]
    for number in range(iterations):
        if number:
            total = log.logsumexp(2, keepdim=True)
            log = log + (gives - total).where(rows, torch.zeros_like(gives))
        total = log.logsumexp(1, keepdim=True)
        log = log + (gets - total).where(columns, torch.zeros_like(gets))
    return log.exp()


def evenly(among: Tensor, counts: Tensor) -> Tensor:
    """Mark entries of every row at even distances.

    Args:
        among: (I, n) bool, the entries to choose from.
        counts: (I,) how many to mark, no more than there are.

    Returns:
        (I, n) bool, exactly `counts[i]` of row i.
    """
    size = among.sum(-1, keepdim=True).clamp(min=1)
    rank, counts = among.cumsum(-1) - 1, counts[:, None]
    before, after = rank * counts + size // 2, (rank + 1) * counts + size // 2
    return among & (after // size > before // size)
