"""What prompts took: the visual tokens that were left of them, and the FLOPs of their prefill."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pore.cost.flops import model_flops
from pore.engine.prefill import TowerWork
from pore.engine.report import Report
from pore.errors import UnsupportedModelError
from pore.families.registry import family_of, images_of, shape_of


@dataclass(frozen=True)
class Effort:
    """What one prompt took.

    Attributes:
        seen: Visual tokens that it came with, without those that the attention mask hides.
        kept: For each image, raster indices of the visual tokens that reached the last layer.
        extra: Visual tokens that reached the last layer and stand for no single patch.
        mean_tokens: Visual tokens averaged over the decoder layers.
        flops: FLOPs of the prefill (true count), or None if the model's sizes are not known.
        unpruned_flops: The same without pruning.
    """

    seen: int
    kept: tuple[tuple[int, ...], ...]
    extra: int
    mean_tokens: float
    flops: int | None
    unpruned_flops: int | None

    @property
    def left(self) -> int:
        """Visual tokens that reached the last layer."""
        return sum(map(len, self.kept)) + self.extra


def pruned_efforts(report: Report) -> list[Effort]:
    """What every prompt of a run took, in the order in which the run saw them.

    Args:
        report: The report of the run.

    Returns:
        One for every prompt.
    """
    return [
        Effort(
            seen=sum(image.seen - image.hidden for image in sample.images),
            kept=tuple(image.kept for image in sample.images),
            extra=sum(image.extra for image in sample.images),
            mean_tokens=sample.mean_visual_tokens,
            flops=sample.flops,
            unpruned_flops=sample.unpruned_flops,
        )
        for sample in report
    ]


def unpruned_efforts(model: Any, inputs: Mapping[str, Any]) -> list[Effort]:
    """What every prompt takes if nothing is pruned.

    Args:
        model: The model.
        inputs: Its processor's output for the prompts.

    Returns:
        One for every prompt.
    """
    family = family_of(model)
    layers = len(family.layers(model))
    images = images_of(model, inputs)
    shape = None
    with suppress(UnsupportedModelError):
        shape = shape_of(model.config)
    efforts = []
    for row, length in enumerate(inputs["attention_mask"].sum(-1).tolist()):
        own = [image for image in images if image.row == row]
        seen = sum(len(image.columns) for image in own)
        flops = None
        if shape is not None:
            work = TowerWork.of(shape, own)._asdict()
            flops = model_flops(shape, [length] * layers, **work).total
        kept = tuple(tuple(range(len(image.columns))) for image in own)
        efforts.append(Effort(seen, kept, 0, float(seen), flops, flops))
    return efforts
