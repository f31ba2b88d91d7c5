"""From sums over a data set to position biases."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pore.bias.any_size import AnySizeBias
from pore.bias.any_size_fitting import fit_any_size
from pore.bias.choosing import Choice, choose, need_halves
from pore.bias.coordinates import Over
from pore.bias.curve import Kind
from pore.bias.fitting import Floats, Points
from pore.bias.judging import warning_of
from pore.bias.position_bias import PositionBias
from pore.bias.provenance import Provenance
from pore.calibration import exact
from pore.calibration.diagnosing import along_bins, along_positions, of_any_size, of_positions
from pore.calibration.diagnosis import Diagnosis
from pore.calibration.positions import Half, Head
from pore.calibration.stability import TIMES, Stability, stability
from pore.calibration.table import Table
from pore.corrections.heads import HeadBiases
from pore.errors import CalibrationError, ProfileError, ScoreError

FitKind = Kind | Literal["auto"]
"""A kind of curve, or "auto" for the kind with the least held-out error."""

Mean = Literal["arithmetic", "geometric"]
"""Which mean of the attention over images a bias is fitted to."""


class Fitting:
    """The fits of a `Calibration`, which defines these attributes."""

    provenance: Provenance
    count: int
    grid: tuple[int, int] | None
    halves: tuple[Half, Half] | None
    table: Table | None
    heads: tuple[Head, ...] | None

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """(N,) the mean attention of every position."""

    @property
    @abstractmethod
    def std(self) -> Tensor:
        """(N,) its standard deviation over images."""

    @abstractmethod
    def images_measured(self) -> int:
        """How many images were measured; CalibrationError if none was."""

    @abstractmethod
    def images_of_one_size(self) -> int:
        """The same; CalibrationError also if images have different sizes."""

    def mean_attention(self, mean: Mean = "arithmetic") -> Tensor:
        """(N,) the mean attention of every position, float64.

        Args:
            mean: "arithmetic" for Ā, as in the paper (Eq. 3); "geometric" for the exponential of
                the mean logarithm.

        Raises:
            CalibrationError: As in `fit`, or the file is from an older pore without logarithms.
        """
        if mean == "arithmetic":
            return self.mean
        images = self.images_of_one_size()
        return torch.tensor(averaged(self._both_halves(), images, mean), dtype=torch.float64)

    def mean_of(self, bias: PositionBias) -> tuple[Tensor, Tensor]:
        """The mean attention that a bias was fitted to, and its standard error.

        Args:
            bias: A bias that was fitted to this calibration.

        Returns:
            (N,) each, float64; the error is NaN for one image.

        Raises:
            CalibrationError: As in `mean_attention`.
        """
        mean: Mean = "geometric" if "geometric" in bias.parameters else "arithmetic"
        error = torch.from_numpy(self._spread(mean)) / math.sqrt(self.count)
        return self.mean_attention(mean), error

    def _spread(self, mean: Mean) -> Floats:
        """(N,) the standard deviation over images around that mean, to first order."""
        if mean == "arithmetic" or self.count == 1:
            return self.std.numpy()
        both = self._both_halves()
        found: Floats = np.array(exact.deviation(both.logs, both.log_squares, self.count))
        return np.asarray(self.mean_attention(mean).numpy() * found)

    def fit(self, kind: FitKind = "exponential", mean: Mean = "arithmetic") -> PositionBias:
        """The position bias that fits the mean attention, with its provenance.

        Warns if the curve spans far more, or less, than the attention that it was fitted to.

        In the model A = P · Â, the logarithm of A is that of P plus what the picture and the
        question add, and its mean shows P. If attention has heavy tails, the arithmetic mean of the
        paper is the mean of a few large values.

        Args:
            kind: Form of the curve, as in `PositionBias.fit`; or "auto" for the one among
                exponential, exponential+offset and spline that is nearest to the half of the images
                that it was not fitted to (`choice` says how near).
            mean: The mean that it is fitted to, see `mean_attention`.

        Returns:
            The bias; with "auto", `parameters["held-out error"]` is that error.

        Raises:
            CalibrationError: No image was measured, or images have different sizes.
            PoreError: The curve cannot be fitted; see `PositionBias.fit`. For "auto", see `choice`.
        """
        measured, error = self.mean_attention(mean), None
        if kind == "auto":
            choice = self.choice(mean)
            kind, error = choice.kind, choice.errors[choice.kind]  # type: ignore[assignment] # one of them
        provenance = replace(self.provenance, samples=self.count)
        found = PositionBias.fit(
            measured,
            kind,  # type: ignore[arg-type] # not "auto"
            grid=self.grid,
            provenance=provenance,
            geometric=mean == "geometric",
        )
        if said := warning_of(found.kind, found.values.numpy(), measured.numpy()):
            warnings.warn(said, stacklevel=2)
        if error is not None:
            found = replace(found, parameters={**found.parameters, "held-out error": error})
        return found

    def choice(self, mean: Mean = "arithmetic") -> Choice:
        """How every kind of curve does on the half of the images that it was not fitted to.

        Args:
            mean: The mean that curves are fitted to, see `mean_attention`.

        Raises:
            CalibrationError: As in `fit`, or the file is from an older pore, which kept no halves.
            ScoreError: All images are in one half.
            ProfileError: No curve can be divided by.
        """
        measured, logs = self.mean_attention(mean).numpy(), mean == "geometric"
        halves = [half for _, half in self._halves(mean)]
        return choose(measured, halves, lambda kind: Points.even(len(measured), logs))

    def diagnose(
        self, kind: FitKind = "auto", keep: int | float = 0.25, mean: Mean = "arithmetic"
    ) -> Diagnosis:
        """Whether `fit(kind, mean)` will help, before anything is pruned by it.

            print(measured.diagnose())

        Args:
            kind: Form of the curve, as in `fit`.
            keep: How many visual tokens will be kept, or which share of them.
            mean: As in `fit`.

        Returns:
            The diagnosis; what cannot be fitted or divided by is a part of it.

        Raises:
            CalibrationError: No image was measured, images have different sizes, or the file is
                from an older pore, which kept no halves.
            ScoreError: All images are in one half, or no curve can be fitted to the attention.
            BudgetError: An image does not have that many tokens to keep.
        """
        measured, halves = self.mean_attention(mean).numpy(), self._halves(mean)
        logs = mean == "geometric"
        return of_positions(measured, self._spread(mean), halves, kind, keep, logs)

    def diagnose_any_size(
        self, kind: FitKind = "auto", over: Over = "distance", keep: int | float = 0.25
    ) -> Diagnosis:
        """Whether `fit_any_size(kind, over)` will help, before anything is pruned by it.

        The tokens that would be kept are those of an image of a usual size.

        Args:
            kind: Form of the curve, as in `fit`.
            over: What P is a function of, see `AnySizeBias`.
            keep: As in `diagnose`.

        Returns:
            The diagnosis.

        Raises:
            CalibrationError: No image was measured, or the file is from an older pore.
            ScoreError: As in `diagnose`.
            BudgetError: As in `diagnose`.
        """
        table = self._table()
        levels = table.levels(over)
        return of_any_size(
            levels,
            table.halves(over),
            over,
            kind,
            keep,
            images=self.count,
            tokens=table.usual_size(),
        )

    def stability(
        self,
        kind: FitKind = "auto",
        keep: int | float = 0.25,
        mean: Mean = "arithmetic",
        over: Over | None = None,
        times: Sequence[float] = TIMES,
    ) -> Stability:
        """How many images are enough for P: how much it depends on which images were measured.

            found = measured.stability()
            print(found)  # found.stable, found.enough, found.agreement

        Args:
            kind: Form of the curve, as in `fit`.
            keep: How many visual tokens will be kept, or which share of them.
            mean: As in `fit`.
            over: For images of any size what P is a function of, as in `fit_any_size`, which takes
                the geometric mean; None for images of one size.
            times: The numbers of images to ask about, as multiples of the number measured; 1 is
                among them.

        Returns:
            What P of fewer and of more images keeps of what P of all keeps.

        Raises:
            CalibrationError: As in `diagnose`, or there is no P.
            ScoreError: As in `diagnose`.
            ProfileError: There is no P.
            BudgetError: As in `diagnose`.
        """
        if over is None:
            measured, halves = self.mean_attention(mean).numpy(), self._halves(mean)
            along = along_positions(measured, self._spread(mean), halves, mean == "geometric")
        else:
            table = self._table()
            along = along_bins(table.levels(over), table.halves(over), over, table.usual_size())
        return stability(*along, kind, keep, self.count, times)

    def _known_halves(self) -> tuple[Half, Half]:
        if self.halves is None:
            raise CalibrationError(
                "These sums are from an older pore, which kept neither the two halves of the data "
                'that kind="auto" and a diagnosis need nor the logarithms that a geometric mean '
                "needs; calibrate again, or name a kind and the arithmetic mean."
            )
        return self.halves

    def _both_halves(self) -> Half:
        first, second = self._known_halves()
        return first.plus(second)

    def _halves(self, mean: Mean) -> list[tuple[int, Floats]]:
        """For each half of the images, their number and their mean attention."""
        self.images_of_one_size()
        halves = self._known_halves()
        need_halves([half.images for half in halves])
        return [(half.images, np.array(averaged(half, half.images, mean))) for half in halves]

    def _table(self) -> Table:
        self.images_measured()
        if self.table is None:
            raise CalibrationError(
                "These sums are from an older pore, which kept nothing for images of any size; "
                "calibrate again."
            )
        return self.table

    def fit_any_size(self, kind: FitKind | None = None, over: Over = "distance") -> AnySizeBias:
        """The position bias for images of any size, of the geometric mean, with its provenance.

        Args:
            kind: Form of the curve, as in `fit`; or "power", a power of the distance. Of all forms
                that was the nearest to the attention on images larger than those it was fitted to,
                on a real language model (docs/results-real-language-model.md). If None, "power"
                over the distance and otherwise "spline".
            over: What P is a function of, see `AnySizeBias`.

        Returns:
            The bias.

        Raises:
            CalibrationError: No image was measured, or the file is from an older pore.
            PoreError: The curve cannot be fitted.
        """
        kind = kind or ("power" if over == "distance" else "spline")
        table = self._table()
        halves = table.halves(over) if kind == "auto" else []
        sizes = min(table.sizes), max(table.sizes)
        provenance = replace(self.provenance, samples=self.count)
        return fit_any_size(table.levels(over), halves, over, kind, sizes, provenance)

    def fit_heads(self, kind: Kind = "exponential", mean: Mean = "arithmetic") -> HeadBiases:
        """A position bias for every head.

        Args:
            kind: Form of the curves, as in `PositionBias.fit`.
            mean: As in `fit`.

        Returns:
            The biases.

        Raises:
            CalibrationError: As in `fit`, or heads were not summed separately.
            PoreError: The curve of a head cannot be fitted; the message says which head.
        """
        images = self.images_of_one_size()
        if self.heads is None:
            raise CalibrationError(
                "These sums are not kept for every head; calibrate with heads=True."
            )
        provenance = replace(self.provenance, samples=images)
        how: dict[str, Any] = {"grid": self.grid, "geometric": mean == "geometric"}
        biases = []
        for number, head in enumerate(self.heads):
            with of_part(f"head {number}"):
                measured = averaged(head, images, mean)
                biases.append(PositionBias.fit(measured, kind, provenance=provenance, **how))
        return HeadBiases(tuple(biases))


def averaged(part: Half | Head, images: int, mean: Mean) -> list[float]:
    """The mean attention of every position, of either kind, from sums over some images."""
    if mean == "geometric":
        return exact.geometric_mean(part.logs, images)
    return exact.mean(part.sums, images)


def part_read(layer: int | None) -> str:
    """The name of what is read to rank tokens before a layer; None stands for a guiding model."""
    return "the guiding model" if layer is None else f"decoder layer {layer - 1}"


@contextmanager
def of_part(name: str) -> Iterator[None]:
    """If a fit fails, name the part of the attention that it was made for."""
    try:
        yield
    except (ProfileError, ScoreError) as error:
        raise type(error)(f"The attention of {name}: {error}") from error
