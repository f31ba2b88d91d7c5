"""From sums over a data set to position biases."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from pore.bias.any_size import AnySizeBias
from pore.bias.any_size_fitting import fit_any_size
from pore.bias.choosing import Choice, choose, need_halves
from pore.bias.coordinates import Over
from pore.bias.curve import Kind
from pore.bias.judging import warning_of
from pore.bias.position_bias import PositionBias
from pore.bias.provenance import Provenance
from pore.calibration import exact
from pore.calibration.positions import Half
from pore.calibration.table import Table
from pore.corrections.heads import HeadBiases
from pore.errors import CalibrationError, ProfileError, ScoreError

FitKind = Kind | Literal["auto"]


"""A kind of curve, or "auto" for that of the least held-out error."""


class Fitting:
    """The fits of a `Calibration`, which has what they are made to."""

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

    @abstractmethod
    def images_measured(self) -> int:
        """How many images were measured, or CalibrationError where none was."""

    @abstractmethod
    def images_of_one_size(self) -> int:
        """The same, or CalibrationError where images have different sizes."""

    def fit(self, kind: FitKind = "exponential") -> PositionBias:
        """The position bias that fits the mean attention, with its provenance.

        Warns where the curve spans far more, or less, than the attention that it was fitted to.

        Args:
            kind: Form of the curve, as in `PositionBias.fit`; or "auto" for that of exponential,
                exponential+offset and spline that is nearest to the half of the images that it was
                not fitted to (`choice` says how near).

        Returns:
            The bias; of "auto", `parameters["held-out error"]` says the error.

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
            CalibrationError: As in `fit`, or the file is of an older pore, which kept no halves.
            ScoreError: All images are in one half.
            ProfileError: No curve can be divided by.
        """
        mean = self.mean
        if self.halves is None:
            raise CalibrationError(
                "These sums are of an older pore, which did not keep the two halves of the data "
                'apart that kind="auto" needs; calibrate again, or name a kind.'
            )
        need_halves([half.images for half in self.halves])
        both = [torch.tensor(exact.mean(half.sums, half.images)).numpy() for half in self.halves]
        return choose(mean.numpy(), both)

    def fit_any_size(self, kind: FitKind = "spline", over: Over = "distance") -> AnySizeBias:
        """The position bias for images of any size, with its provenance.

        Args:
            kind: Form of the curve, as in `fit`.
            over: What it is a function of, see `AnySizeBias`.

        Returns:
            The bias.

        Raises:
            CalibrationError: No image was measured, or the file is of an older pore.
            PoreError: The curve cannot be fitted.
        """
        self.images_measured()
        if self.table is None:
            raise CalibrationError(
                "These sums are of an older pore, which kept nothing for images of any size; "
                "calibrate again."
            )
        halves = []
        if kind == "auto":
            halves = [self.table.levels(over, half) for half in (0, 1)]
            need_halves([len(half.bins) for half in halves])
        sizes = min(self.table.sizes), max(self.table.sizes)
        provenance = replace(self.provenance, samples=self.count)
        return fit_any_size(self.table.levels(over), halves, over, kind, sizes, provenance)

    def fit_heads(self, kind: Kind = "exponential") -> HeadBiases:
        """A position bias for every head.

        Args:
            kind: Form of the curves, as in `PositionBias.fit`.

        Returns:
            The biases.

        Raises:
            CalibrationError: As in `fit`, or heads were not told apart.
            PoreError: The curve of a head cannot be fitted; the message says of which.
        """
        images = self.images_of_one_size()
        if self.heads is None:
            raise CalibrationError(
                "Heads were not told apart in these sums; calibrate with heads=True."
            )
        provenance = replace(self.provenance, samples=images)
        biases = []
        for number, sums in enumerate(self.heads):
            mean = exact.mean(sums, images)
            with of_part(f"head {number}"):
                biases.append(PositionBias.fit(mean, kind, grid=self.grid, provenance=provenance))
        return HeadBiases(tuple(biases))


@contextmanager
def of_part(name: str) -> Iterator[None]:
    """Say of a fit that fails which part of what was read it is of."""
    try:
        yield
    except (ProfileError, ScoreError) as error:
        raise type(error)(f"What is read of {name}: {error}") from error
