"""D²Pruner: attention divided by its mean, then tokens that are unlike each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pore.engine.corrections import Reweight
from pore.engine.readers import LastToken
from pore.engine.stages import Selection, View
from pore.errors import CalibrationError, ScoreError
from pore.families.base import Family
from pore.methods._checks import check_share
from pore.methods.scorer import ScoredPruner
from pore.methods.topv import coordinates
from pore.tensors.gathering import inverse, unit
from pore.tensors.selection import by_score, check_scores, top_k


@dataclass(frozen=True)
class D2Pruner(ScoredPruner):
    """Keep what is attended to more than usual, then tokens unlike each other (arXiv 2512.19443).

    EXPERIMENTAL. The authors' code was not available. This follows their abstract and two
    implementations by others; the golden files come from one of these and fix steps 2 and 3 for
    `semantic=1`. What is not known is marked as ours.

    1. A_i / P_i: the attention of the last text token in layer K - 1, averaged over heads, divided
       by its mean over a data set. P is `reweight`, which this method needs. The authors' P is the
       plain mean: `pore.calibrate(model, processor, samples, layer=2).fit("empirical")`. Another
       kind of P makes it PoRe with the following steps.
    2. A share `pivots` of the budget goes to the tokens with the highest A_i / P_i.
    3. The other tokens are visited from the highest A_i / P_i down. A token is taken unless its
       similarity to one taken before in this step is above `threshold`; pivots do not count. The
       similarity is the cosine of the states entering layer K. If that leaves too few, the highest
       of the skipped tokens fill up.

    With `semantic` below 1 the similarity of two tokens d patches apart is
    semantic · cosine + (1 - semantic) · exp(-d² / 2). For grounding the authors include nearness on
    the grid; it is not known how, and this form is ours. If a family does not say where tokens lie,
    all lie at one place.

    Exactly `keep` tokens stay, at their positions. A fraction is rounded; the port truncates it.
    The port also adds 1e-7 to the mean before it divides; that is omitted here, as P has no scale.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
        layer: K, the 0-based index of the first pruned layer.
        reweight: The position bias P, or another correction. It must be given.
        pivots: Share of the kept tokens that are pivots, at least one of them.
        threshold: Similarity above which the second of two tokens is skipped.
        semantic: Weight of the states in the similarity, from 0 to 1.
    """

    reweight: Reweight | None = None
    pivots: float = 0.7
    threshold: float = 0.8
    semantic: float = 1.0

    name: ClassVar[str] = "D2Pruner"
    paper: ClassVar[str] = "arXiv 2512.19443; equal to a port, not to its authors' code"
    reweightable: ClassVar[bool] = True
    always_reweighted: ClassVar[bool] = True
    experimental: ClassVar[bool] = True
    earliest: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(pivots=self.pivots)
        if not -1 <= self.threshold <= 1:
            raise ScoreError(f"threshold is a similarity from -1 to 1, not {self.threshold!r}.")
        if not 0 <= self.semantic <= 1:
            raise ScoreError(f"semantic is a weight from 0 to 1, not {self.semantic!r}.")

    @classmethod
    def usual(cls, keep: int | float, shape: object) -> None:
        """None: it needs a position bias."""

    def reader(self) -> LastToken:
        """The last text token's attention."""
        return LastToken()

    def score(self, view: View) -> Tensor:
        """A, the attention of the last text token."""
        attention: Tensor = view.attention
        return attention

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse to run without a position bias, and what `ScoredPruner` refuses."""
        if self.reweight is None:
            raise CalibrationError(
                "D2Pruner divides attention by its mean over a data set, but none was given. "
                "Measure it, bias = pore.calibrate(model, processor, samples, "
                f'layer={self.layer}).fit("empirical"), and give it as reweight=bias; or with '
                f"`pore calibrate --layer {self.layer} --kind empirical`, for --reweight."
            )
        super().check(model, family)

    def choose(self, view: View, scores: Tensor) -> Selection:
        """Pivots, an independent set of the others, and tokens that fill up."""
        valid, budgets = view.layout.valid, view.budget(self.keep)
        kept = torch.tensor(budgets, device=valid.device)
        check_scores(scores, kept, valid)
        first = torch.tensor([self._pivots(count) for count in budgets], device=valid.device)
        pivots = top_k(scores, first, valid)
        similar = _similarity(view, self.semantic)
        found = independent(
            scores, kept - first, valid & ~pivots, lambda i: similar(i) > self.threshold
        )
        # By rank, so that tokens that fill up come after all that were chosen.
        order = inverse(by_score(scores, valid))
        return Selection(top_k((pivots | found) * order.shape[1] - order, kept, valid))

    def _pivots(self, keep: int) -> int:
        return max(1, int(keep * self.pivots))


def _similarity(view: View, semantic: float) -> Callable[[Tensor], Tensor]:
    """A function that returns the similarity of one token (I,) of every image to all (I, t)."""
    states = unit(view.features)
    images = torch.arange(len(states), device=states.device)
    places = coordinates(view.layout)[0].to(states) if semantic < 1 else None

    def similar(token: Tensor) -> Tensor:
        likeness = (states @ states[images, token, :, None])[..., 0]
        if places is None:
            return likeness
        apart = (places - places[images, token, None]).square().sum(-1)
        return semantic * likeness + (1 - semantic) * torch.exp(-apart / 2)

    return similar


def independent(
    scores: Tensor,
    counts: Tensor,
    candidates: Tensor,
    neighbours: Callable[[Tensor], Tensor],
) -> Tensor:
    """Take the best tokens so that no two are neighbours: a greedy maximal independent set.

    Args:
        scores: (I, t) scores; of equal ones the earlier token is taken first.
        counts: (I,) how many to take at most.
        candidates: (I, t) bool, the tokens that can be taken.
        neighbours: Returns (I, t) bool, the neighbours of one token (I,) of every image.

    Returns:
        (I, t) bool.
    """
    rank = inverse(by_score(scores, candidates))
    taken, free = torch.zeros_like(candidates), candidates
    for number in range(int(counts.max())):
        best = rank.masked_fill(~free, rank.shape[1]).argmin(-1, keepdim=True)
        goes_on = free.gather(1, best) & (number < counts[:, None])
        itself = torch.zeros_like(taken).scatter(1, best, goes_on)
        taken = taken | itself
        free = free & ~itself & ~(neighbours(best[:, 0]) & goes_on)
    return taken
