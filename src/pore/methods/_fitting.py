"""How a scheme of FitPrune is fitted: what every layer can delete without losing attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pore.cost.decoders import DecoderShape
from pore.engine.pruner import Pruner
from pore.engine.readers import HeadMax
from pore.engine.stages import Selection, Stage, View
from pore.errors import CalibrationError
from pore.families.base import Family
from pore.methods.staged import check_stages
from pore.tensors.gathering import inverse


@dataclass(frozen=True)
class FitStep:
    """One step of the bisection.

    Attributes:
        alpha: Share of a layer's attention that may be lost.
        reached: Whether the FLOPs asked for were reached on the samples.
        scheme: Tokens deleted after every layer, on average over the images, rounded down.
    """

    alpha: float
    reached: bool
    scheme: tuple[int, ...]


@dataclass(frozen=True)
class FittedScheme:
    """The result of a fit.

    Attributes:
        scheme: Tokens to delete after every layer.
        visual: Visual tokens of an image.
        steps: All steps of the bisection.
    """

    scheme: tuple[int, ...]
    visual: int
    steps: tuple[FitStep, ...]


def fit_scheme(
    forward: Callable[[Pruner], None],
    shape: DecoderShape,
    reduction: float,
    *,
    faithful: bool = False,
) -> FittedScheme:
    """How many tokens to delete after every layer to save a share (arXiv 2409.10197, Sec. 3.3).

    Let alpha be the share of attention that may be lost. Every layer in turn ranks the tokens
    twice: by the attention from visual tokens and by the attention from text. From the end of each
    ranking it marks as many tokens as can be deleted while the others get at least 1 - alpha of the
    attention that all tokens get unpruned; tokens that are marked twice are deleted. Once the FLOPs
    reach the goal without further deletions, the remaining layers delete none. The smallest alpha
    that reaches the goal is found by bisection, to within 0.01.

    The layers after that point run here anyway but are not counted, which changes nothing. If even
    deleting everything would not fall below the threshold in a layer, the authors' code reuses an
    older count; here the layer deletes all but one token. No golden file has that case.

    Args:
        forward: Sends the samples through the model, pruned by the method that it gets: the same
            samples in the same order in every call.
        shape: The decoder's sizes, for the FLOPs of visual tokens: projections for the tokens that
            enter a layer, output projection and MLP for those that are left.
        reduction: Share of the FLOPs to save, between 0 and 1.
        faithful: Whether to take the scheme of the last alpha tried, as the authors' code does,
            even if it missed the goal; otherwise that of the smallest alpha that reached it.

    Returns:
        The scheme, with the steps of the bisection.

    Raises:
        CalibrationError: `reduction` is not a share, there is no image, images have different
            numbers of tokens, or no alpha saves that much.
    """
    if not 0 < reduction < 1:
        raise CalibrationError(f"reduction must be a share between 0 and 1, not {reduction!r}.")
    look = _Walk(shape.layers)
    forward(look)
    if not look.visual:
        raise CalibrationError("There is no image among the inputs to fit a scheme on.")
    visual, *others = sorted(set(look.visual))
    if others:
        raise CalibrationError(
            f"The images have {[visual, *others]} visual tokens; a scheme needs images of one size."
        )
    steps: list[FitStep] = []
    low, high = 0.0, 1.0
    while high - low > 0.010001:
        alpha = (low + high) / 2
        walk = _Walk(shape.layers, alpha, look.noted)
        forward(walk)
        step = _step(alpha, walk.noted.long(), visual, shape, reduction)
        low, high = (low, alpha) if step.reached else (alpha, high)
        steps.append(step)
    reached = [step for step in steps if step.reached]
    if not reached and not faithful:
        raise CalibrationError(
            f"On these samples no deletion saves {reduction:g} of the FLOPs; ask for less."
        )
    last = steps[-1] if faithful else reached[-1]
    return FittedScheme(last.scheme, visual, tuple(steps))


def _step(
    alpha: float, deleted: Tensor, visual: int, shape: DecoderShape, reduction: float
) -> FitStep:
    """The step for deletions (B, layers) in B images, which end once the goal is reached."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    mlp = (3 if shape.gated else 2) * shape.hidden * shape.intermediate

    def before(n: Tensor) -> int:
        return int((n * shape.hidden * (queries + 2 * keys) + 2 * n * n * queries).sum())

    def after(n: Tensor) -> int:
        return int((n * (queries * shape.hidden + mlp)).sum())

    n = torch.full((len(deleted),), visual)
    goal = (1 - reduction) * shape.layers * (before(n) + after(n))
    used, reached = 0, False
    scheme = [0] * shape.layers
    for layer in range(shape.layers):
        used += before(n)
        if used + after(n) + (shape.layers - 1 - layer) * (before(n) + after(n)) <= goal:
            reached = True
            break
        scheme[layer] = int(deleted[:, layer].sum()) // len(deleted)
        n = n - deleted[:, layer]
        used += after(n)
    return FitStep(alpha, reached, tuple(scheme))


def lightest(weights: Tensor, total: Tensor, alpha: float, valid: Tensor) -> Tensor:
    """The smallest weights, as many as can be dropped without losing more than a share.

    Args:
        weights: (I, t) weights.
        total: (I,) their sum in the unpruned model.
        alpha: Share of `total` that may be lost.
        valid: (I, t) bool, False where a smaller image is filled up.

    Returns:
        (I, t) bool, the weights to drop: as many as leave at least 1 - alpha of `total`, but never
        all; none if their sum is less than that already.
    """
    ordered, order = weights.masked_fill(~valid, torch.inf).sort(dim=-1, stable=True)
    ordered = ordered.masked_fill(~valid.sort(dim=-1, descending=True)[0], 0.0)
    left = ordered.sum(-1, keepdim=True) - ordered.cumsum(-1) + ordered  # before each goes
    enough = (left >= total[:, None] * (1 - alpha)) & valid.sort(dim=-1, descending=True)[0]
    count = (enough.sum(-1, keepdim=True) - 1).clamp(min=0)
    return inverse(order) < count


class _Walk(Pruner):
    """Looks at every layer of the unpruned model, or deletes as a fit does with some alpha.

    Attributes:
        visual: Visual tokens of every image seen.
    """

    paper = "arXiv 2409.10197"

    def __init__(
        self,
        layers: int,
        alpha: float = 0.0,
        totals: Tensor | None = None,
    ) -> None:
        self.alpha, self.totals = alpha, totals
        self.visual: list[int] = []
        self._notes: list[list[Tensor]] = [[] for _ in range(layers)]

    @property
    def name(self) -> str:  # type: ignore[override]
        return "FitPrune"

    @property
    def noted(self) -> Tensor:
        """For every image and layer: (B, layers, 2) attention, or (B, layers) tokens deleted."""
        return torch.stack([torch.cat(notes) for notes in self._notes], 1)

    def stages(self) -> Sequence[Stage]:
        return [Stage(n + 1, partial(self._rule, n), HeadMax()) for n in range(len(self._notes))]

    def check(self, model: nn.Module, family: Family) -> None:
        check_stages(self.stages(), family, model)

    def _rule(self, layer: int, view: View) -> Selection:
        attention, layout, notes = view.attention, view.layout, self._notes[layer]
        visual, text = attention.unbind(1)
        if layer == 0:
            self.visual += layout.counts
        if self.totals is None:
            sums = [part.masked_fill(~layout.valid, 0.0).sum(-1) for part in (visual, text)]
            notes.append(torch.stack(sums, -1).cpu())
            return Selection(layout.valid)
        first = sum(map(len, notes))
        totals = self.totals[first : first + len(visual), layer].to(visual.device)
        gone = lightest(visual, totals[:, 0], self.alpha, layout.valid)
        gone = gone & lightest(text, totals[:, 1], self.alpha, layout.valid)
        notes.append(gone.sum(-1).cpu())
        return Selection(layout.valid & ~gone)
