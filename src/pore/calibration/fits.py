"""From sums over a data set to position biases."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import numpy as np
from torch import Tensor

from pore.bias.any_size import AnySizeBias
from pore.bias.any_size_fitting import fit_any_size
from pore.bias.choosing import Choice, choose, need_halves
from pore.bias.coordinates import Over
from pore.bias.curve import Kind
from pore.bias.fitting import Floats
from pore.bias.judging import warning_of
from pore.bias.position_bias import PositionBias
from pore.bias.provenance import Provenance
from pore.calibration import exact
from pore.calibration.diagnosing import of_any_size, of_positions
from pore.calibration.diagnosis import Diagnosis
from pore.calibration.positions import Half
from pore.calibration.table import Table
from pore.corrections.heads import HeadBiases
from pore.errors import CalibrationError, ProfileError, ScoreError

FitKind = Kind | Literal["auto"]


"""A kind of curve, or "auto" for the kind with the least held-out error."""


class Fitting:
    """The fits of a `Calibration`, which defines these attributes."""

    provenance: Provenance
    count: int
    grid: tuple[int, int] | None
    halves: tuple[Half, Half] | None
    table: Table | None
    heads: tuple[tuple[int, ...], ...] | None

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

    def fit(self, kind: FitKind = "exponential") -> PositionBias:
        """The position bias that fits the mean attention, with its provenance.

        Warns if the curve spans far more, or less, than the attention that it was fitted to.

        Args:
            kind: Form of the curve, as in `PositionBias.fit`; or "auto" for the one among
                exponential, exponential+offset and spline that is nearest to the half of the images
                that it was not fitted to (`choice` says how near).

        Returns:
            The bias; with "auto", `parameters["held-out error"]` is that error.

        Raises:
            CalibrationError: No image was measured, or images have different sizes.
            PoreError: The curve cannot be fitted; see `PositionBias.fit`. For "auto", see `choice`.
        """
        mean, error = self.mean, None
        if kind == "auto":
            choice = self.choice()
            kind, error = choice.kind, choice.errors[choice.kind]  # type: ignore[assignment] # one of them
        provenance = replace(self.provenance, samples=self.count)
        found = PositionBias.fit(mean, kind, grid=self.grid, provenance=provenance)  # type: ignore[arg-type] # not "auto"
        if said := warning_of(found.kind, found.values.numpy(), mean.numpy()):
            warnings.warn(said, stacklevel=2)
        if error is not None:
            found = replace(found, parameters={**found.parameters, "held-out error": error})
        return found

    def choice(self) -> Choice:
        """How every kind of curve does on the half of the images that it was not fitted to.

        Raises:
            CalibrationError: As in `fit`, or the file is from an older pore, which kept no halves.
            ScoreError: All images are in one half.
            ProfileError: No curve can be divided by.
        """
        mean = self.mean
        return choose(mean.numpy(), [half for _, half in self._halves()])

    def diagnose(self, kind: FitKind = "auto", keep: int | float = 0.25) -> Diagnosis:
        """Whether `fit(kind)` will help, before anything is pruned by it.

            print(measured.diagnose())

        Args:
            kind: Form of the curve, as in `fit`.
            keep: How many visual tokens will be kept, or which share of them.

        Returns:
            The diagnosis; what cannot be fitted or divided by is a part of it.

        Raises:
            CalibrationError: No image was measured, images have different sizes, or the file is
                from an older pore, which kept no halves.
            ScoreError: All images are in one half, or no curve can be fitted to the attention.
            BudgetError: An image does not have that many tokens to keep.
        """
        mean = self.mean.numpy()
        return of_positions(mean, self.std.numpy(), self._halves(), kind, keep)

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

    def _halves(self) -> list[tuple[int, Floats]]:
        """For each half of the images, their number and their mean attention."""
        self.images_of_one_size()
        if self.halves is None:
            raise CalibrationError(
                "These sums are from an older pore, which did not keep the two halves of the data "
                'apart that kind="auto" and a diagnosis need; calibrate again, or name a kind.'
            )
        need_halves([half.images for half in self.halves])
        return [(half.images, np.array(exact.mean(half.sums, half.images))) for half in self.halves]

    def _table(self) -> Table:
        self.images_measured()
        if self.table is None:
            raise CalibrationError(
                "These sums are from an older pore, which kept nothing for images of any size; "
                "calibrate again."
            )
        return self.table

    def fit_any_size(self, kind: FitKind = "spline", over: Over = "distance") -> AnySizeBias:
        """The position bias for images of any size, with its provenance.

        Args:
            kind: Form of the curve, as in `fit`.
            over: What P is a function of, see `AnySizeBias`.

        Returns:
            The bias.

        Raises:
            CalibrationError: No image was measured, or the file is from an older pore.
            PoreError: The curve cannot be fitted.
        """
        table = self._table()
        halves = table.halves(over) if kind == "auto" else []
        sizes = min(table.sizes), max(table.sizes)
        provenance = replace(self.provenance, samples=self.count)
        return fit_any_size(table.levels(over), halves, over, kind, sizes, provenance)

    def fit_heads(self, kind: Kind = "exponential") -> HeadBiases:
        """A position bias for every head.

        Args:
            kind: Form of the curves, as in `PositionBias.fit`.

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
        biases = []
        for number, sums in enumerate(self.heads):
            mean = exact.mean(sums, images)
            with of_part(f"head {number}"):
                biases.append(PositionBias.fit(mean, kind, grid=self.grid, provenance=provenance))
        return HeadBiases(tuple(biases))


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
