"""Sums over images of any size: by the distance of a token to the text, and by its place.

P over the positions of an image only suits images of one size. A function of the distance to the
last text token, or of the place in the image, suits images of any size. The data for its fit is
kept here: the attention of every token is added to one cell by its distance, to another by its
raster position and to a third by its row and column. Images of different sizes have separate cells,
because a token of a large image gets less of the attention than one of a small image; so have the
two halves of the data set, so that what is fitted to one half can be tested on the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

from pore.bias.any_size_fitting import Levels
from pore.bias.choosing import need_halves
from pore.bias.coordinates import BINS, OVER, Over, bins_of
from pore.calibration import exact

Key = tuple[Over, int, int, int]
"""The coordinate of a cell, the half of the samples (0 or 1), the size of its images (in half
octaves of their number of tokens) and the bin."""

Cell = tuple[int, int, int]
"""What is kept for the tokens in a cell: their number, and their sum and sum of squares."""


class Rows(NamedTuple):
    """What one stage read for n images of one size.

    Attributes:
        grid: Rows and columns of their visual tokens, or None if they lie on no single grid.
        attention: (n, N) attention on every visual token; for several stages (S, n, N).
        sample: (n,) which sample of the batch each image is of.
        distance: (n, N) tokens from every visual token to the last one of its prompt.
        place: (n, N, 2) relative row and column of every token, from 0 to 1; None without a grid.
        heads: (n, H, N) the same for every head; for several stages (S, n, H, N). None if heads are
            not read separately.
    """

    grid: tuple[int, int] | None
    attention: np.ndarray
    sample: np.ndarray
    distance: np.ndarray
    place: np.ndarray | None = None
    heads: np.ndarray | None = None

    def stage(self, number: int) -> Rows:
        """The rows of one of several stages."""
        heads = None if self.heads is None else self.heads[number]
        return self._replace(attention=self.attention[number], heads=heads)


@dataclass(frozen=True)
class Table:
    """Exact sums of attention over cells.

    Attributes:
        cells: For each cell, the number of tokens and two sums. With x the attention of a token
            times the number of tokens of its image, they are the sum of ln x, as
            `exact.log_units` gives it, and the sum of its square.
        sizes: How many images of each number of visual tokens were measured.
    """

    cells: Mapping[Key, Cell] = field(default_factory=dict)
    sizes: Mapping[int, int] = field(default_factory=dict)

    def including(self, rows: Rows, halves: np.ndarray) -> Table:
        """The table with more images.

        Args:
            rows: What was read for them.
            halves: (n,) which half of the samples each image is in, 0 or 1.
        """
        images, tokens = rows.attention.shape
        cells, sizes = dict(self.cells), dict(self.sizes)
        sizes[tokens] = sizes.get(tokens, 0) + images
        size = size_class(tokens)
        units = exact.log_units(rows.attention * tokens)
        raster = np.broadcast_to((np.arange(tokens) + 0.5) / tokens, (images, tokens))
        of = {"distance": rows.distance, "raster": raster, "place": rows.place}
        for over in OVER:
            where = of[over]
            if where is None:
                continue
            found = bins_of(over, where)
            for half in (0, 1):
                mine = halves == half
                bins, part = found[mine].reshape(-1), units[mine].reshape(-1)
                counts = np.bincount(bins, minlength=BINS[over])
                sums, squares = np.zeros((2, BINS[over]), dtype=object)
                np.add.at(sums, bins, part)
                np.add.at(squares, bins, part * part)
                for b in counts.nonzero()[0].tolist():
                    new = int(counts[b]), int(sums[b]), int(squares[b])
                    _add(cells, (over, half, size, b), new)
        return Table(cells, sizes)

    def merged(self, other: Table) -> Table:
        """The table with the images of another one."""
        cells, sizes = dict(self.cells), dict(self.sizes)
        for key, cell in other.cells.items():
            _add(cells, key, cell)
        for tokens, images in other.sizes.items():
            sizes[tokens] = sizes.get(tokens, 0) + images
        return Table(cells, sizes)

    def levels(self, over: Over, half: int | None = None) -> Levels:
        """The geometric mean and spread of every bin's attention, by size of the image.

        Attention is relative to 1 / N.

        Args:
            over: The coordinate that the bins divide.
            half: Which half of the samples to take, 0 or 1; None for all.
        """
        found: dict[tuple[int, int], Cell] = {}
        for (what, part, size, b), cell in self.cells.items():
            if what == over and half in (None, part):
                _add(found, (size, b), cell)
        sizes = sorted({size for size, _ in found})
        bins = sorted({b for _, b in found})
        mean, counts, spread = (np.zeros((len(sizes), len(bins))) for _ in range(3))
        for (size, b), (count, total, square) in found.items():
            at = sizes.index(size), bins.index(b)
            mean[at], counts[at] = exact.geometric_mean([total], count)[0], count
            if count > 1:  # the spread of x from that of ln x, to first order
                spread[at] = mean[at] * exact.deviation([total], [square], count)[0]
        return Levels(np.array(bins, dtype=int), np.array(sizes, dtype=int), mean, counts, spread)

    def halves(self, over: Over) -> list[Levels]:
        """The same of either half of the samples, or ScoreError where one has none."""
        found = [self.levels(over, half) for half in (0, 1)]
        need_halves([len(half.bins) for half in found])
        return found

    def usual_size(self) -> int:
        """The number of tokens of a usual image, of the class of sizes with the most tokens."""
        tokens: dict[int, int] = {}
        for size, images in self.sizes.items():
            tokens[size_class(size)] = tokens.get(size_class(size), 0) + size * images
        usual = max(tokens, key=tokens.__getitem__)
        of_it = {s: n for s, n in self.sizes.items() if size_class(s) == usual}
        return max(of_it, key=of_it.__getitem__)

    def document(self) -> dict[str, Any]:
        """The table as JSON can hold it."""
        return {
            "sizes": sorted(map(list, self.sizes.items())),
            "logs": [[*key, *cell] for key, cell in sorted(self.cells.items())],
        }

    @classmethod
    def of_document(cls, document: Any) -> Table:
        """The table in JSON of any origin; ValueError if it holds none."""
        if not isinstance(document, dict) or document.keys() != {"sizes", "logs"}:
            raise ValueError("the table must have sizes and logs.")
        cells, sizes = document["logs"], document["sizes"]
        if not (isinstance(cells, list) and isinstance(sizes, list)):
            raise ValueError("sizes and logs must be lists.")
        for one in sizes:
            if not (isinstance(one, list) and len(one) == 2 and all(map(_counts, one))):
                raise ValueError("sizes must be pairs of tokens and images.")
        for one in cells:
            if not (isinstance(one, list) and len(one) == 7 and one[0] in OVER):
                raise ValueError("a cell must have its coordinate, half, size, bin and sums.")
            _, half, size, b, count, total, square = one
            whole = all(type(each) is int and each >= 0 for each in one[1:])
            if not whole or half > 1 or b >= BINS[one[0]] or not count or size > _LARGEST:
                raise ValueError("a cell is not one that attention can be added to.")
            largest = exact.largest_sum(1) << _TOKENS
            if total > count * largest or not total * total <= count * square <= (
                count * total * largest
            ):
                raise ValueError("the sums of a cell cannot be sums of attention.")
        return cls({tuple(one[:4]): tuple(one[4:]) for one in cells}, dict(map(tuple, sizes)))


_LARGEST, _TOKENS = 60, 30
"""The largest class of sizes, and the bits of the largest number of visual tokens."""


def size_class(tokens: int) -> int:
    """The half octave of a number of visual tokens: 576 is in 18, which is from 512 to 724."""
    return int(2 * np.log2(tokens) + 1e-9)


_Key = TypeVar("_Key")


def _add(cells: dict[_Key, Cell], key: _Key, new: Cell) -> None:
    """Add further tokens to a cell."""
    count, total, square = cells.get(key, (0, 0, 0))
    cells[key] = count + new[0], total + new[1], square + new[2]


def _counts(value: Any) -> bool:
    return type(value) is int and value > 0
