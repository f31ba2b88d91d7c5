"""SGL: a small model's attention chooses a large one's visual tokens, or its answer is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pore.cost.shapes import ModelShape
from pore.engine.corrections import AttentionCorrection, Reweight
from pore.engine.limits import check_layer
from pore.engine.stages import Stage, View
from pore.errors import InputError
from pore.families.base import Family
from pore.methods.guides import Guide, Guides
from pore.methods.guiding import answer_probabilities
from pore.methods.scorer import ScoredPruner


@dataclass(frozen=True)
class SGL(ScoredPruner):
    """Keep the visual tokens that a small model attended to most (arXiv 2412.03324).

    The small model answers the same prompts first, `pore.guide(small, inputs, ...)`; the attention
    that its visual tokens got over all layers, heads and rows ranks those of the large model. Both
    models must cut images into the same tokens. Kept tokens keep their original positions.

    Attributes:
        keep: Tokens kept per image (int), or the fraction kept (float).
        layer: The 0-based index of the first pruned layer. The authors' is a fraction of the depth,
            int(0.4 * layers) in their script.
        guide: The small model's guide for the batch that the large model gets; or, in `evaluate`,
            an object that makes the guide of every batch.
        reweight: P of the small model's summed attention (`pore.calibrate_guide`), which divides
            `Guide.importance`; None leaves that as it is.
        faithful: Truncate a fraction of the tokens in float32, as the authors' code does, instead
            of rounding it; a small fraction can then keep no token.
    """

    layer: int = field()  # removes the default of `ScoredPruner`
    guide: Guide | Guides
    reweight: Reweight | None = None
    faithful: bool = False

    name: ClassVar[str] = "SGL"
    paper: ClassVar[str] = "arXiv 2412.03324"
    reweightable: ClassVar[bool] = True
    guided: ClassVar[bool] = True

    @classmethod
    def usual(
        cls, keep: int | float, shape: ModelShape, guide: Guide | Guides | None = None
    ) -> SGL | None:
        """The method with a guide as its authors set it up, scaled to a model's depth.

        Args:
            keep: Visual tokens left at the end, per image, or the fraction.
            shape: The sizes of the model that is pruned.
            guide: The guide, or an object that makes one for every batch.

        Returns:
            The method; None without a guide.
        """
        if guide is None:
            return None
        return cls(keep, layer=int(0.4 * shape.decoder.layers), guide=guide)

    def stages(self) -> Sequence[Stage]:
        """One stage, before the chosen layer; positions stay on the embeddings too."""
        return [replace(stage, positions="original") for stage in super().stages()]

    def check(self, model: nn.Module, family: Family) -> None:
        """Refuse a layer that the decoder does not have, and a guide or bias that does not fit."""
        check_layer(self.layer, family, model, first=0)
        self.guide.check(model)
        correction = self._correction
        if isinstance(correction, AttentionCorrection):
            raise InputError(
                f"{self.name} ranks by the attention of another model, and the correction "
                f"{correction.kind!r} looks at the layer that ranks; use a position bias "
                "(pore.calibrate_guide)."
            )
        if correction is not None:
            seen = self.guide.provenance
            conditions = ("model", "revision", "weights", "config", "normalize")
            correction.check(**{name: getattr(seen, name) for name in conditions})

    @property
    def looks_at(self) -> list[int]:
        """The layers that the guide was made from, if a model guides itself."""
        return self.guide.looks_at

    def kept(self, visual: int) -> int:
        """How many tokens stay of an image that came with `visual` tokens."""
        if self.faithful and isinstance(self.keep, float):
            return int(torch.tensor(visual) * self.keep)  # int64 times float: float32
        return super().kept(visual)

    def score(self, view: View) -> Tensor:
        """What the small model's attention gives every token."""
        if not isinstance(self.guide, Guide):
            raise InputError("A guide belongs to one batch: prune each batch with its own guide.")
        layout = view.layout
        importance = self.guide.importance[self.guide.match(layout)].to(layout.raster.device)
        # After another method there are fewer tokens; one that shows no patch ranks last.
        return importance.gather(1, layout.raster.clamp(min=0)).masked_fill(layout.raster < 0, 0)


def consistency(
    model: nn.Module,
    inputs: Mapping[str, Any],
    guide: Guide,
    *,
    keep: int | float = 0.05,
    reweight: Reweight | None = None,
    faithful: bool = False,
) -> Tensor:
    """How probable the small model finds its own answers when it sees few visual tokens.

    This is the product of the probabilities of an answer's tokens in a teacher-forced pass, in
    which only the most important visual tokens enter the first layer, at their original positions.
    It is not normalised by the answer's length (arXiv 2412.03324).

    Args:
        model: The model that made the guide, not pruned; it is left as it was.
        inputs: The inputs that the guide was made from.
        guide: The guide.
        keep: Tokens kept per image (int), or the fraction kept (float).
        reweight: As in `SGL`.
        faithful: As in `SGL`.

    Returns:
        (B,) probabilities, at least float32.

    Raises:
        PoreError: The inputs are not those of the guide, or `keep` cannot be met.
    """
    pruner = SGL(keep, layer=0, guide=guide, reweight=reweight, faithful=faithful)
    with pruner(model) as run:
        if (embeds := inputs.get("inputs_embeds")) is not None:
            run.mark_visual(_marks(guide, embeds.shape[:2]))
        chosen = answer_probabilities(run.model, inputs, guide.sequences)
    return chosen.masked_fill(~guide.answered, 1.0).prod(1)


def _marks(guide: Guide, shape: Sequence[int]) -> Tensor:
    marks = torch.zeros(*shape, dtype=torch.bool)
    for image in guide.images:
        marks[image.row, list(image.columns)] = True
    return marks


def mean_of_both(confidence: Tensor, consistency: Tensor) -> Tensor:
    """The mean of confidence and consistency.

    Args:
        confidence: (B,) `Guide.confidence`.
        consistency: (B,) what `consistency` returns.

    Returns:
        (B,) scores from 0 to 1.
    """
    return (confidence + consistency) / 2


def early_exit(
    guide: Guide,
    consistency: Tensor,
    threshold: float,
    score: Callable[[Tensor, Tensor], Tensor] = mean_of_both,
) -> Tensor:
    """Which answers of the small model can be used, so that the large one need not answer.

    The authors' code logs both numbers and leaves the decision to a later analysis, so neither
    `score` nor any threshold is theirs: choose them on your own data.

    Args:
        guide: The small model's answers, with their confidence.
        consistency: (B,) what `consistency` returns.
        threshold: The smallest score with which an answer is used.
        score: Makes one score (B,) from confidence and consistency.

    Returns:
        (B,) bool, True where the answer is used.
    """
    return score(guide.confidence, consistency.to(guide.confidence.device)) >= threshold
