"""The positions of the visual tokens whose attention is corrected."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from pore.errors import InputError
from pore.layout import Layout

Positions = Literal["original", "dense"]
"""How kept tokens are numbered: as they came, or anew as if the dropped ones had never been."""


@dataclass(frozen=True)
class Where:
    """The positions of the visual tokens of I images whose attention is corrected.

    What follows from them is computed once: some hosts correct every head by itself.

    Attributes:
        layout: Where they lie in the sequence as it is now.
        positions: Which position of a token counts. "original": where it was when the prompt
            entered the model. "dense", for methods that number positions anew: where it is now.
        beside: What the correction read besides the attention that it corrects; None if nothing.
    """

    layout: Layout
    positions: Positions = "original"
    beside: Any = None

    @cached_property
    def on_cpu(self) -> Where:
        """The same with its layout on the CPU."""
        return replace(self, layout=self.layout.to(torch.device("cpu")))

    @cached_property
    def counts(self) -> Tensor:
        """(I, 1) how many tokens every image came with, on the device of the layout."""
        counts = [image.count for image in self.layout.images]
        return torch.tensor(counts, device=self.layout.columns.device)[:, None]

    @cached_property
    def raster(self) -> Tensor:
        """(I, t) positions in the image, from 0 to its number of tokens - 1, in raster order.

        With "dense", the position as far from the end of the image as the token is now: if 20 of
        100 tokens are left, the first has position 80.
        """
        if self.positions == "original":
            return self.layout.places(self.counts)
        slots = torch.arange(self.layout.raster.shape[1], device=self.layout.raster.device)
        left = self.layout.valid.sum(-1, keepdim=True)
        return torch.minimum((self.counts - left + slots).clamp(min=0), self.counts - 1)

    @cached_property
    def distance(self) -> Tensor:
        """(I, t) how many tokens later the last token of the prompt comes, at least 1."""
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

    @cached_property
    def place(self) -> Tensor:
        """(I, t, 2) relative row and column of every token in its picture, each from 0 to 1.

        The first of 4 rows is at 1/8, the last at 7/8. For an image in tiles or a video in frames,
        it is the place in the tile or frame. A token that stands for no patch is put in the middle.

        Raises:
            InputError: The tokens of an image lie on no grid.
        """
        layout = self.layout
        patches = layout.shows()[1] if self.positions == "original" else self.raster
        found = torch.full((*layout.raster.shape, 2), 0.5, dtype=torch.float64)
        found = found.to(patches.device)
        for i, image in enumerate(layout.images):
            if image.cells is None:
                raise InputError(
                    f"The tokens of image {image.index} of sample {image.row} lie on no grid, so "
                    "they have no row and column; use a position bias over the distance to the "
                    "text."
                )
            rows, columns = image.cells
            cell = patches[i] % (rows * columns)  # of a video, in its frame
            both = torch.stack(
                [(cell // columns + 0.5) / rows, (cell % columns + 0.5) / columns], -1
            )
            found[i] = torch.where((patches[i] < 0)[:, None], found[i], both.to(found))
        return found
