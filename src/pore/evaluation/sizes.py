"""How many visual tokens the images have that are asked about."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from pore.errors import InputError
from pore.evaluation.batches import Batches
from pore.families.registry import family_of, images_of
from pore.layout import Image
from pore.tensors.selection import budget


@dataclass(frozen=True)
class ImageSizes:
    """The numbers of visual tokens of some images.

    Attributes:
        least: The smallest number.
        usual: The median.
        most: The largest.
        any_size: Whether the model takes images of any size, or cuts them into tiles.
        videos: Whether they are videos.
    """

    least: int
    usual: int
    most: int
    any_size: bool
    videos: bool = False

    @classmethod
    def of(cls, model: Any, images: list[Image]) -> ImageSizes:
        """The sizes of some images, one or more.

        Args:
            model: The model that they are images of.
            images: The images.
        """
        counts = [len(image.columns) for image in images]
        any_size = family_of(model).common_grid(model) is None
        videos = all(image.of_video for image in images)
        return cls(min(counts), statistics.median_low(counts), max(counts), any_size, videos)

    def budget(self, keep: int | float) -> int | float:
        """A budget in tokens; where images may differ in size, a share stays a share of each.

        Args:
            keep: Tokens per image (int), or the fraction kept (float).

        Raises:
            BudgetError: There is an image with fewer tokens.
        """
        tokens = budget(keep, self.least)
        return keep if self.any_size else tokens

    def __str__(self) -> str:
        if self.least == self.most:
            return str(self.most)
        return f"{self.least} to {self.most}"


def images_asked(batches: Batches) -> list[Image]:
    """The images that will be asked about.

    Args:
        batches: The questions.

    Returns:
        The images of all good samples, one or more.

    Raises:
        InputError: No sample has an image, or too many samples are bad.
    """
    made = (batches.inputs(i) for i in range(len(batches)))
    images = [image for inputs in made if inputs for image in images_of(batches.model, inputs)]
    if not images:
        raise InputError("The samples have no images, and this asks about images.")
    return images
