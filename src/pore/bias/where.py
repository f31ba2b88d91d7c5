"""Where the visual tokens lie whose attention is corrected."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pore.errors import InputError
from pore.layout import Image, Layout

Positions = Literal["original", "dense"]


"""How tokens that stay are numbered: as they came, or anew as if the dropped ones never were."""


@dataclass(frozen=True)
class Where:
    """Where the visual tokens of I images lie whose attention is corrected.

    Attributes:
        layout: Where they lie in the sequence as it is now.
        positions: Where a position counts. "original": where the token was when the prompt entered
            the model. "dense", for methods that number positions anew: where it is now.
        beside: What the correction read beside the attention that it corrects; None if nothing.
    """

    layout: Layout
    positions: Positions = "original"
    beside: Any = None

    @property
    def on_cpu(self) -> Where:
        """The same with its layout on the CPU."""
        return replace(self, layout=self.layout.to(torch.device("cpu")))

    @property
    def counts(self) -> Tensor:
        """(I, 1) how many tokens every image came with, on the device of the layout."""
        counts = [image.count for image in self.layout.images]
        return torch.tensor(counts, device=self.layout.columns.device)[:, None]

    @property
    def raster(self) -> Tensor:
        """(I, t) positions in the image, from 0 to its number of tokens - 1, in raster order.

        With "dense", the position that is as far from the end of the image as the token
        is now: of 100 tokens that came and 20 that are left, the first has 80.
        """
        if self.positions == "original":
            return self.layout.places(self.counts)
        slots = torch.arange(self.layout.raster.shape[1], device=self.layout.raster.device)
        left = self.layout.valid.sum(-1, keepdim=True)
        return torch.minimum((self.counts - left + slots).clamp(min=0), self.counts - 1)

    @property
    def distance(self) -> Tensor:
        """(I, t) how many tokens farther on the last token of the prompt is; 1 for the next."""
        layout = self.layout
        if self.positions == "dense":
            return layout.last[layout.rows, None] - layout.columns
        widest = max((image.count for image in layout.images), default=0)
        columns = torch.zeros(len(layout.images), widest, dtype=torch.long)
        for i, image in enumerate(layout.images):
            places = range(len(image.columns)) if image.places is None else image.places
            columns[i, list(places)] = torch.as_tensor(image.columns)
        columns = columns.to(layout.columns.device)
        return layout.entered_last[layout.rows, None] - columns.gather(1, self.raster)

    @property
    def place(self) -> Tensor:
        """(I, t, 2) relative row and column of every token in its picture, each from 0 to 1.

        The first of 4 rows is at 1/8, the last at 7/8. Of an image in tiles or a video in frames,
        the place is that in the tile or frame. A token that stands for no patch is at the middle.

        Raises:
            InputError: The tokens of an image lie on no grid.
        """
        layout = self.layout
        tiles, patches = layout.shows() if self.positions == "original" else (None, self.raster)
        found = torch.full((*layout.raster.shape, 2), 0.5, dtype=torch.float64)
        found = found.to(patches.device)
        for i, image in enumerate(layout.images):
            rows, columns = grid_of(image)
            patch = patches[i] if tiles is not None else patches[i] % (rows * columns)
            row, column = patch // columns, patch % columns
            both = torch.stack([(row + 0.5) / rows, (column + 0.5) / columns], -1)
            found[i] = torch.where((patch < 0)[:, None], found[i], both.to(found))
        return found


def grid_of(image: Image) -> tuple[int, int]:
    """Rows and columns of an image's tokens, or of those of each of its tiles.

    Raises:
        InputError: They lie on no grid.
    """
    if image.grid is not None:
        return image.grid
    if image.tiling is not None and image.tiling.tiles > 1:
        side = math.isqrt(image.tiling.patches)
        if side * side == image.tiling.patches:
            return side, side
    raise InputError(
        f"The tokens of image {image.index} of sample {image.row} lie on no grid, so that they "
        "have no row and column; use a position bias over the distance to the text."
    )
