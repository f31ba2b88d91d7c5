"""FitPrune: fewer visual tokens behind almost every layer, by a scheme fitted on samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pore.cost.decoders import DecoderShape
from pore.cost.shapes import ModelShape
from pore.engine.pruner import Pruner
from pore.engine.readers import HeadMax, _cross
from pore.engine.run import Run, unpruned
from pore.engine.stages import Selection, Stage, View
from pore.errors import BudgetError, CalibrationError
from pore.families.base import Family
from pore.families.registry import family_of, shape_of
from pore.methods.staged import bias_of_each, check_stages, freeze
from pore.tensors.selection import budget, check_keep, top_k

if TYPE_CHECKING:
    from pore.bias.position_bias import PositionBias


SCHEME_60 = (
    14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4,
    26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0,
)  # fmt: skip


"""Deletions behind every layer of LLaVA-1.5-7B, published for 60 % less: 449 of 576 tokens."""


@dataclass(frozen=True)
class FitPrune(Pruner):
    """Delete visual tokens behind every layer, as many as a scheme says (arXiv 2409.10197).

    Behind layer l, tokens are ranked by that layer's own attention, the largest of its heads: what
    a token gets from the visual tokens on average, times what it gets from the text behind the
    image on average. The lowest are deleted. How many in which layer is fitted beforehand, on the
    attention of a few samples: see `fit` and `fit_scheme`. Kept tokens keep their positions.

    The authors delete inside layer l, before its output projection and MLP. Neither mixes tokens,
    so those that stay get the same values; here both still run on the tokens about to be deleted.
    With the published scheme at 576 tokens that is 4.4 % more than the authors' FLOPs for the
    visual tokens (1.8 % of the unpruned ones). All attention of visual and text rows to visual
    columns is computed a second time, some rows at a time, so FlashAttention stays in use.

    The default scheme is the one that the authors publish for 60 % less of LLaVA-1.5-7B, and needs
    a decoder of 32 layers; `keep=127` of 576 tokens is what they run. With another budget or
    another number of tokens, what is deleted by the end of every layer is scaled in proportion, so
    that exactly `keep` tokens are left; that is ours. `usual` scales to other depths, also ours.

    With `reweight=P` the text's part is divided by P before the product. The visual part has the
    opposite, causal bias and is left alone.

    Attributes:
        keep: Tokens left per image behind the last deletion (int), or the fraction left (float).
        scheme: Tokens deleted behind every decoder layer, to be scaled to `keep`.
        reweight: The position bias P, or one for every layer that deletes, or None.
    """

    keep: int | float
    scheme: tuple[int, ...] = SCHEME_60
    reweight: PositionBias | tuple[PositionBias, ...] | None = None

    name: ClassVar[str] = "FitPrune"
    paper: ClassVar[str] = "arXiv 2409.10197"
    reweightable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        freeze(self, "scheme", "reweight")
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in self.scheme)
        if not whole or not any(self.scheme):
            raise BudgetError(
                f"scheme={self.scheme!r} is no scheme; give the tokens deleted behind every "
                "decoder layer, whole numbers of at least 0, not all of them 0."
            )
        bias_of_each(self.reweight, len(self._layers))

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> FitPrune:
        """The published scheme for 60 % less, stretched over the model's depth."""
        depth, published = shape.decoder.layers, len(SCHEME_60)
        total, gone, scheme = sum(SCHEME_60), 0, []
        for layer in range(1, depth + 1):
            whole, rest = divmod(layer * published, depth)
            # What is deleted by here, straight between two layers of the published decoder.
            until = sum(SCHEME_60[:whole]) + (SCHEME_60[whole] * rest / depth if rest else 0)
            scheme.append(round(until) - gone)
            gone += scheme[-1]
        assert gone == total
        return cls(keep, tuple(scheme))

    @classmethod
    @torch.inference_mode()
    def fit(
        cls,
        model: nn.Module,
        inputs: Iterable[Mapping[str, Any]],
        reduction: float = 0.6,
        *,
        reweight: PositionBias | Sequence[PositionBias] | None = None,
        faithful: bool = False,
    ) -> FitPrune:
        """The method with a scheme fitted to a model, on samples.

        Args:
            model: A supported model that is not pruned; it is left as it was.
            inputs: What the processor makes, batch by batch, on the model's device; every image
                with the same number of tokens. It is gone through eight times, so give a list, or
                an iterable that starts anew every time.
            reduction: Share of the FLOPs of visual tokens to save, between 0 and 1.
            reweight: The position bias P that the method will have, or one for every decoder layer.
            faithful: As in `fit_scheme`.

        Returns:
            The method: its scheme, and what that leaves of the images' tokens.

        Raises:
            ModelStateError: The model is pruned.
            CalibrationError: As in `fit_scheme`, or `inputs` cannot be gone through again.
        """
        if isinstance(inputs, Iterator):
            raise CalibrationError(
                "The inputs are gone through several times, but these end after one; give a list."
            )
        model = unpruned(model)
        family = family_of(model)

        def forward(pruner: Pruner) -> None:
            with Run(pruner, model, history=1):
                for batch in inputs:
                    family.base(model)(**batch, use_cache=False)

        shape = shape_of(model.config).decoder
        fitted = fit_scheme(forward, shape, reduction, reweight=reweight, faithful=faithful)
        if reweight is not None and isinstance(reweight, Sequence):
            deleting = zip(reweight, fitted.scheme, strict=True)
            reweight = tuple(bias for bias, count in deleting if count)
        return cls(fitted.visual - sum(fitted.scheme), fitted.scheme, reweight)

    @property
    def _layers(self) -> list[int]:
        """The layers that delete."""
        return [layer for layer, count in enumerate(self.scheme) if count]

    def stages(self) -> Sequence[Stage]:
        """One stage behind every layer that deletes, by the attention of that layer."""
        return [
            Stage(layer + 1, partial(self._select, number), HeadMax(), curve=_cross)
            for number, layer in enumerate(self._layers)
        ]

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse a decoder of another depth, and biases measured under other conditions."""
        self._check_depth(len(family.layers(model)))
        stages = self.stages()
        check_stages(stages, bias_of_each(self.reweight, len(stages)), family, model)

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image that enter every decoder layer."""
        self._check_depth(layers)
        return [visual, *left_behind(self.scheme, self.keep, visual)][:layers]

    def _check_depth(self, layers: int) -> None:
        if len(self.scheme) != layers:
            raise BudgetError(
                f"The scheme is of {len(self.scheme)} decoder layers, this decoder has {layers}; "
                "fit one with FitPrune.fit, or stretch the published one with FitPrune.usual."
            )

    def _select(self, number: int, view: View) -> Selection:
        attention: Tensor = view.attention
        visual, text = attention.unbind(1)
        bias = bias_of_each(self.reweight, len(self._layers))[number]
        if bias is not None:
            text = view.reweighted(text, bias)
        layer = self._layers[number]
        left = view.budget(lambda n: left_behind(self.scheme, self.keep, n)[layer])
        valid = view.layout.valid
        counts = torch.tensor(left, device=valid.device)
        if number < len(self._layers) - 1:
            # A method before this one in a chain may have left fewer than are left on the way.
            counts = torch.minimum(counts, valid.sum(-1))
        return Selection(top_k(visual * text, counts, valid))


def left_behind(scheme: Sequence[int], keep: int | float, visual: int) -> list[int]:
    """Tokens of one image that are left behind every decoder layer.

    Args:
        scheme: Tokens deleted behind every layer, to be scaled.
        keep: Tokens left behind the last one, or the fraction.
        visual: Tokens that the image came with.

    Returns:
        One number for each layer, the last being the budget. Halves are deleted.

    Raises:
        BudgetError: The image has fewer tokens.
    """
    total, whole = visual - budget(keep, visual), sum(scheme)
    left, gone = [], 0
    for count in scheme:
        gone += count
        left.append(visual - (2 * total * gone + whole) // (2 * whole))
    return left


@dataclass(frozen=True)
class FitStep:
    """One step of the bisection.

    Attributes:
        alpha: Share of a layer's attention that may be lost.
        reached: Whether the samples came down to the FLOPs asked for.
        scheme: Tokens deleted behind every layer, on average over the images, rounded down.
    """

    alpha: float
    reached: bool
    scheme: tuple[int, ...]


@dataclass(frozen=True)
class FittedScheme:
    """What a fit found.

    Attributes:
        scheme: Tokens to delete behind every layer.
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
    reweight: PositionBias | Sequence[PositionBias] | None = None,
    faithful: bool = False,
) -> FittedScheme:
    """How many tokens to delete behind every layer to save so much (arXiv 2409.10197, Sec. 3.3).

    For a share alpha that may be lost, every layer in turn deletes the tokens that are both among
    those least looked at by visual tokens and among those least looked at by text, each as many as
    can go while what is left gets at least 1 - alpha of the attention that all get unpruned. Once
    the FLOPs come down to the goal without deleting more, the other layers delete none. The
    smallest alpha that gets there is found by bisection, to within 0.01.

    The layers behind that point run here all the same and are not counted; that changes nothing.
    In the authors' code a layer of which no deletion would fall below the threshold takes over an
    older count; here it deletes all but one token. No golden file has that case.

    Args:
        forward: Sends the samples through the model, pruned by the method that it is given: the
            same samples in the same order at every call.
        shape: The decoder's sizes, for FLOPs: of visual tokens alone, projections at the tokens
            that enter a layer, output projection and MLP at those left.
        reduction: Share of the FLOPs to save, between 0 and 1.
        reweight: P that divides what text gives, here as later in use: one, or one for each layer.
        faithful: Whether to take the scheme of the last alpha tried, as the authors' code does,
            even where it missed the goal; else that of the smallest alpha that reached it.

    Returns:
        The scheme, with the way to it.

    Raises:
        CalibrationError: `reduction` is no share, there is no image, images have different numbers
            of tokens, or no alpha saves so much.
    """
    if not 0 < reduction < 1:
        raise CalibrationError(f"The reduction is a share between 0 and 1, not {reduction!r}.")
    biases = reweight if reweight is None or not isinstance(reweight, Sequence) else tuple(reweight)
    look = _Walk(shape.layers, biases)
    forward(look)
    if not look.visual:
        raise CalibrationError("There is no image among the inputs to fit a scheme on.")
    visual, *others = sorted(set(look.visual))
    if others:
        raise CalibrationError(
            f"The images have {[visual, *others]} visual tokens; a scheme is of images of one size."
        )
    steps: list[FitStep] = []
    low, high = 0.0, 1.0
    while high - low > 0.010001:
        alpha = (low + high) / 2
        walk = _Walk(shape.layers, biases, alpha, look.noted)
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
    """What deletions (B, layers) of B images come to, up to where they reach the goal."""
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
    """The least of some weights, as many as can go without losing more than a share.

    Args:
        weights: (I, t) weights.
        total: (I,) what they were together in the unpruned model.
        alpha: Share of `total` that may be lost.
        valid: (I, t) bool, False where a smaller image is filled up.

    Returns:
        (I, t) bool, the weights that go: as many as leave at least 1 - alpha of `total`, but never
        all; none where they are less from the start.
    """
    ordered, order = weights.masked_fill(~valid, torch.inf).sort(dim=-1, stable=True)
    ordered = ordered.masked_fill(~valid.sort(dim=-1, descending=True)[0], 0.0)
    left = ordered.sum(-1, keepdim=True) - ordered.cumsum(-1) + ordered  # before each goes
    enough = (left >= total[:, None] * (1 - alpha)) & valid.sort(dim=-1, descending=True)[0]
    count = (enough.sum(-1, keepdim=True) - 1).clamp(min=0)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return rank < count


class _Walk(Pruner):
    """Looks at every layer of the unpruned model, or deletes as a fit does with some alpha.

    Attributes:
        visual: Visual tokens of every image seen.
    """

    paper = FitPrune.paper

    def __init__(
        self,
        layers: int,
        reweight: PositionBias | tuple[PositionBias, ...] | None,
        alpha: float = 0.0,
        totals: Tensor | None = None,
    ) -> None:
        self.biases = bias_of_each(reweight, layers)
        self.alpha, self.totals = alpha, totals
        self.visual: list[int] = []
        self._notes: list[list[Tensor]] = [[] for _ in range(layers)]

    @property
    def name(self) -> str:  # type: ignore[override]
        return FitPrune.name

    @property
    def noted(self) -> Tensor:
        """Of every image and layer: (B, layers, 2) attention, or (B, layers) tokens deleted."""
        return torch.stack([torch.cat(notes) for notes in self._notes], 1)

    def stages(self) -> Sequence[Stage]:
        layers = range(len(self._notes))
        return [Stage(n + 1, partial(self._rule, n), HeadMax(), curve=_cross) for n in layers]

    def check(self, model: nn.Module, family: Family) -> None:
        check_stages(self.stages(), self.biases, family, model)

    def _rule(self, layer: int, view: View) -> Selection:
        attention, layout, notes = view.attention, view.layout, self._notes[layer]
        visual, text = attention.unbind(1)
        if (bias := self.biases[layer]) is not None:
            text = view.reweighted(text, bias)
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
