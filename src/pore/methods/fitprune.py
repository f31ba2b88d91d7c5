"""FitPrune: deletes visual tokens after almost every layer, by a scheme fitted on samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pore.cost.shapes import ModelShape
from pore.engine.corrections import Reweight
from pore.engine.pruner import Pruner
from pore.engine.readers import HeadMax, _product
from pore.engine.run import Run, unpruned
from pore.engine.stages import Stage, View
from pore.errors import BudgetError, CalibrationError
from pore.families.base import Family
from pore.families.registry import family_of, shape_of
from pore.methods._checks import is_whole
from pore.methods._fitting import fit_scheme
from pore.methods.staged import StagedPruner, correction_of_each
from pore.tensors.selection import budget, check_keep

SCHEME_60 = (
    14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4,
    26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1, 0, 0, 0,
)  # fmt: skip
"""Deletions after every layer of LLaVA-1.5-7B, published for 60 % less: 449 of 576 tokens."""


@dataclass(frozen=True)
class FitPrune(StagedPruner):
    """Delete visual tokens after every layer, as many as a scheme says (arXiv 2409.10197).

    After layer l, tokens are ranked by that layer's own attention, the largest of its heads: what
    a token gets from the visual tokens on average, times what it gets from the text after the
    image on average. The lowest are deleted. How many are deleted after which layer is fitted
    beforehand, on the attention of a few samples: see `fit` and `fit_scheme`. Kept tokens keep
    their positions.

    The authors delete inside layer l, before its output projection and MLP. Neither mixes tokens,
    so those that stay get the same values; here both still run on the tokens about to be deleted.
    With the published scheme at 576 tokens that is 4.4 % more than the authors' FLOPs for the
    visual tokens (1.8 % of the unpruned ones). All attention of visual and text rows to visual
    columns is computed a second time, some rows at a time, so FlashAttention stays in use.

    The default scheme is the one that the authors publish for saving 60 % in LLaVA-1.5-7B, and
    needs a decoder of 32 layers; they run it with `keep=127` of 576 tokens. For another budget or
    another number of tokens, the deletions up to every layer are scaled in proportion, so that
    exactly `keep` tokens are left; this is ours. `usual` scales to other depths, which is also
    ours.

    With `reweight=P` the product is divided by P. Text favours the end of an image; visual tokens
    favour its beginning, because only later tokens see a token at all. In the product the two
    biases partly cancel; a P of the text alone would leave the other.

    Attributes:
        keep: Tokens left per image after the last deletion (int), or the fraction left (float).
        scheme: Tokens deleted after every decoder layer, to be scaled to `keep`.
        reweight: The position bias P or another correction, or one for every layer that deletes, or
            None.
    """

    keep: int | float
    scheme: tuple[int, ...] = SCHEME_60
    reweight: Reweight | tuple[Reweight, ...] | None = None

    name: ClassVar[str] = "FitPrune"
    paper: ClassVar[str] = "arXiv 2409.10197"
    reweightable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        whole = all(is_whole(count) and count >= 0 for count in self.scheme)
        if not whole or not any(self.scheme):
            raise BudgetError(
                f"scheme={self.scheme!r} is not a scheme; give the tokens deleted after every "
                "decoder layer, whole numbers of at least 0, not all of them 0."
            )
        super().__post_init__()

    @classmethod
    def usual(cls, keep: int | float, shape: ModelShape) -> FitPrune:
        """The published scheme for saving 60 %, stretched over the model's depth."""
        depth, published = shape.decoder.layers, len(SCHEME_60)
        total, gone, scheme = sum(SCHEME_60), 0, []
        for layer in range(1, depth + 1):
            whole, rest = divmod(layer * published, depth)
            # The deletions up to here, interpolated linearly between two published layers.
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
        reweight: Reweight | Sequence[Reweight] | None = None,
        faithful: bool = False,
    ) -> FitPrune:
        """The method with a scheme fitted to a model, on samples.

        Args:
            model: A supported model that is not pruned; it is left as it was.
            inputs: The processor's outputs, batch by batch, on the model's device; every image has
                the same number of tokens. They are used eight times, so give a list, or an iterable
                that can be iterated again.
            reduction: Share of the FLOPs of visual tokens to save, between 0 and 1.
            reweight: The position bias P that the method will have, or one for every decoder layer.
                The scheme is that without: it says how many tokens go, and P which of them.
            faithful: As in `fit_scheme`.

        Returns:
            The method with this scheme, and with the number of tokens that it leaves as `keep`.

        Raises:
            ModelStateError: The model is pruned.
            CalibrationError: As in `fit_scheme`, or `inputs` cannot be iterated again.
        """
        if isinstance(inputs, Iterator):
            raise CalibrationError(
                "The inputs are needed several times, but these can be read only once; give a list."
            )
        model = unpruned(model)
        family = family_of(model)

        def forward(pruner: Pruner) -> None:
            with Run(pruner, model, history=1):
                for batch in inputs:
                    family.base(model)(**batch, use_cache=False)

        shape = shape_of(model.config).decoder
        if reweight is not None and isinstance(reweight, Sequence):
            _ = correction_of_each(tuple(reweight), shape.layers)
        fitted = fit_scheme(forward, shape, reduction, faithful=faithful)
        if reweight is not None and isinstance(reweight, Sequence):
            deleting = zip(reweight, fitted.scheme, strict=True)
            reweight = tuple(bias for bias, count in deleting if count)
        return cls(fitted.visual - sum(fitted.scheme), fitted.scheme, reweight)

    def first_layers(self) -> tuple[int, ...]:
        """The layers that follow those that delete."""
        return tuple(layer + 1 for layer, count in enumerate(self.scheme) if count)

    def reader(self) -> HeadMax:
        """What every token gets from visual tokens and from text, in the largest head."""
        return HeadMax()

    def stages(self) -> Sequence[Stage]:
        """One stage after every layer that deletes, by the attention of that layer."""
        return [replace(stage, curve=_product) for stage in super().stages()]

    def remaining(self, visual: int) -> Sequence[int]:
        """Tokens left after every layer that deletes."""
        left = left_after_layers(self.scheme, self.keep, visual)
        return [left[layer - 1] for layer in self.first_layers()]

    def score(self, stage: int, view: View) -> Tensor:
        """The attention from visual tokens times that from text, divided by P if there is one."""
        return view.corrected(_product(view.attention))

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse a decoder of another depth, and biases measured under other conditions."""
        self._check_depth(len(family.layers(model)))
        super().check(model, family)

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image that enter every decoder layer."""
        self._check_depth(layers)
        return super().counts(visual, layers)

    def _check_depth(self, layers: int) -> None:
        if len(self.scheme) != layers:
            raise BudgetError(
                f"The scheme is for {len(self.scheme)} decoder layers, this decoder has {layers}; "
                "fit one with FitPrune.fit, or stretch the published one with FitPrune.usual."
            )


def left_after_layers(scheme: Sequence[int], keep: int | float, visual: int) -> list[int]:
    """Tokens of one image that are left after every decoder layer.

    Args:
        scheme: Tokens deleted after every layer, to be scaled.
        keep: Tokens left after the last deletion, or the fraction.
        visual: Tokens that the image came with.

    Returns:
        One number for each layer; the last one is the budget. If a scaled number ends in one half,
        that token is deleted.

    Raises:
        BudgetError: The image has fewer tokens.
    """
    total, whole = visual - budget(keep, visual), sum(scheme)
    left, gone = [], 0
    for count in scheme:
        gone += count
        left.append(visual - (2 * total * gone + whole) // (2 * whole))
    return left
