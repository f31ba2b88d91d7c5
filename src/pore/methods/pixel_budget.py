"""The pixel budget: a smaller picture, the baseline before the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from pore.data.prompts import Resize
from pore.data.scaling import settings_for, size_for, tokens_of
from pore.engine.limits import check_limits
from pore.engine.stages import Limit, Selection, Stage, View
from pore.errors import InputError
from pore.families.base import Family
from pore.families.registry import family_of
from pore.methods.scorer import BudgetPruner
from pore.tensors.selection import budget

if TYPE_CHECKING:
    import PIL.Image


@dataclass(frozen=True)
class PixelBudget(BudgetPruner):
    """Scale pictures down until the model makes at most `keep` tokens of them.

    This is what a user of a model that takes images of any size does who wants fewer tokens, and it
    saves work in the vision tower, too. The counterpart for models that bring every image to one
    size is `Downsample`.

    It acts before the processor, which `pore generate`, `evaluate` and `serve` see to. In Python:

        pruner = PixelBudget(keep=256)
        inputs = build_inputs(processor, samples, resize=pruner.resizing(model, processor))
        with pruner(model) as run: ...

    A picture keeps its shape. Processors round sizes, to whole squares of patches or to tiles, so
    that fewer than `keep` tokens may be left; reports have the real number. A picture of which
    there are no more than that stays as it is. Where a processor brings every picture to a size of
    its own, its setting is lowered instead, for all pictures alike: the number of tiles (InternVL,
    Aya Vision), the longest side (Idefics3, SmolVLM) or the number of tokens (Gemma 4).

    Attributes:
        keep: The most tokens per image (int), or their share of the image's own (float).
    """

    name: ClassVar[str] = "PixelBudget"
    paper: ClassVar[str] = "baseline"
    resizes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_made", set())  # numbers of tokens of the pictures made

    def stages(self) -> Sequence[Stage]:
        """One stage, which drops nothing: it refuses images that were not scaled."""
        return [Stage(0, self._check_scaled, positions="original")]

    def limits(self, family: Family) -> list[Limit]:
        """Images must become more or fewer tokens by their size."""
        found = super().limits(family)
        if not (family.encodes or family.tiles):
            found.append(
                Limit("every image becomes as many tokens, whatever its size. Use Downsample.")
            )
        return found

    def counts(self, visual: int, layers: int) -> list[int]:
        """Visual tokens of one image that enter every decoder layer, at most."""
        return [budget(self.keep, visual)] * layers

    def resizing(self, model: nn.Module, processor: Any) -> Resize:
        """How pictures are made smaller for a model.

        Args:
            model: The model.
            processor: Its processor.

        Returns:
            A setting of the processor, where that decides; and what scales a picture, which raises
            `BudgetError` where no smaller one has so few tokens.

        Raises:
            UnsupportedModelError: Every image becomes as many tokens, whatever its size.
            BudgetError: No setting of the processor gives so few tokens.
        """
        check_limits(self, family_of(model))
        settings = settings_for(model, processor, self.keep)
        known: dict[tuple[int, int], int | None] = {}

        def tokens(size: tuple[int, int]) -> int | None:
            if size not in known:
                known[size] = tokens_of(model, processor, size, settings)
            return known[size]

        def smaller(picture: PIL.Image.Image) -> PIL.Image.Image:
            whole, keep = tokens(picture.size), self.keep
            if isinstance(keep, float):
                keep = 1 if whole is None else budget(keep, whole)
            size = size_for(tokens, picture.size, keep)
            self._made.add(tokens(size))  # type: ignore[attr-defined]
            return picture if size == picture.size else picture.resize(size)

        return Resize(smaller, settings)

    def _check_scaled(self, view: View) -> Selection:
        made: set[int] = self._made  # type: ignore[attr-defined]
        for image in view.layout.images:
            if image.of_video or image.count not in made:
                what = "a video" if image.of_video else f"an image of {image.count} visual tokens"
                raise InputError(
                    f"{self.name} scales pictures before the processor makes inputs of them, and "
                    f"this prompt has {what} that it has not scaled; build the inputs with "
                    "resize=pruner.resizing(model, processor), of images alone."
                )
        return Selection(view.layout.valid)
