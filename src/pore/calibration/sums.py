"""The mean attention over a data set, as sums that are exact, mergeable and saved."""

from __future__ import annotations

import logging
import math
import os
import statistics
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pore._files import shown
from pore._saved.forms import Form, whole_numbers
from pore._saved.saved import Saved
from pore.bias.position_bias import ANY_SIZE, HEADS, POSITIONS
from pore.bias.position_bias import SEVERAL as SEVERAL_BIASES
from pore.bias.provenance import Provenance
from pore.calibration import exact
from pore.calibration.batch import BadSample, Batch, reasons
from pore.calibration.conditions import CONDITIONS, common, differences
from pore.calibration.fits import Fitting
from pore.calibration.positions import Half, Head, PositionSums, halves_of, heads_of
from pore.calibration.seen import digest, of_text, to_text, united
from pore.calibration.table import Table
from pore.errors import CalibrationError

_log = logging.getLogger("pore.calibration")


SEVERAL = "pore.host_calibration"
"""The schema for the calibrations of several stages; see `HostCalibration`."""

_FORM = Form(
    schema="pore.calibration",
    what="calibration",
    error=CalibrationError,
    entries={
        "provenance": dict,
        "dtype": str,
        "passes": list,
        "seen": int,
        "count": int,
        "bad": list,
        "grid": (list, type(None)),
        "sums": list,
        "squares": list,
        "samples": (str, type(None)),
        "halves": (list, type(None)),
        "table": (dict, type(None)),
        "heads": (list, type(None)),
    },
    most=256 << 20,
    absent={"samples": None, "halves": None, "table": None, "heads": None},
    elsewhere={
        SEVERAL: "it holds several stages; read it with HostCalibration.load.",
        **dict.fromkeys(
            (POSITIONS, SEVERAL_BIASES, ANY_SIZE, HEADS),
            "it holds P; the sums that P was fitted to are in the file beside it, whose name ends "
            "in .calibration.json.",
        ),
    },
)


@dataclass(frozen=True)
class Calibration(Fitting, Saved):
    """Sums over a data set of the attention on every visual position, and how they were measured.

    Attributes:
        provenance: The conditions of the measurement, its date and source.
        dtype: The model's floating type, such as "float32".
        passes: For each pass over samples that is included, a digest of the samples in order.
        seen: Number of samples processed, including bad ones.
        count: Number of images whose attention is in the sums.
        bad: The samples skipped, with the reason.
        grid: Rows and columns of the visual tokens, if known.
        sums: For each of the N positions the sum of the attention, in units of 2⁻⁶²; empty before
            the first image, and if images have different sizes (`mixed`).
        squares: For each position the sum of the squared attention, in units of 2⁻¹²⁴.
        samples: For every sample, in order, 8 bytes for its picture and prompt and 4 for its id;
            None if unknown, as in files from an older pore.
        halves: For each of two halves of the images, the number of images, the sums, and those of
            the logarithm and its square; None if unknown, likewise.
        table: Sums for images of any size; None if unknown, likewise.
        heads: For each head the sums of its attention and of the logarithm over the same images;
            None if heads were not summed separately.
    """

    provenance: Provenance
    dtype: str
    passes: tuple[str, ...]
    seen: int = 0
    count: int = 0
    bad: tuple[BadSample, ...] = field(default=(), repr=False)
    grid: tuple[int, int] | None = None
    sums: tuple[int, ...] = field(default=(), repr=False)
    squares: tuple[int, ...] = field(default=(), repr=False)
    samples: bytes | None = field(default=None, repr=False)
    halves: tuple[Half, Half] | None = field(default=None, repr=False)
    table: Table | None = field(default=None, repr=False)
    heads: tuple[Head, ...] | None = field(default=None, repr=False)

    _form: ClassVar[Form] = _FORM

    def __len__(self) -> int:
        return len(self.sums)

    @property
    def mixed(self) -> bool:
        """Whether images had different sizes, so that no position has a mean."""
        return self.count > 0 and not self.sums

    @property
    def mean(self) -> Tensor:
        """Ā of every position, of shape (N,), float64.

        Raises:
            CalibrationError: No image was measured, or images have different sizes.
        """
        return torch.tensor(exact.mean(self.sums, self.images_of_one_size()), dtype=torch.float64)

    @property
    def std(self) -> Tensor:
        """Standard deviation of the attention over images, (N,) float64; NaN for one image.

        Raises:
            CalibrationError: As for `mean`.
        """
        count = self.images_of_one_size()
        if count == 1:
            return torch.full((len(self),), torch.nan, dtype=torch.float64)
        found = exact.deviation(self.sums, self.squares, count)
        return torch.tensor(found, dtype=torch.float64)

    @property
    def sem(self) -> Tensor:
        """Standard error of the mean, (N,) float64; NaN for one image.

        Raises:
            CalibrationError: As for `mean`.
        """
        return self.std / math.sqrt(self.images_of_one_size())

    def band(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The confidence band of the mean at each position, if images are independent.

        Args:
            level: Confidence, between 0 and 1.

        Returns:
            Lower and upper bound, each (N,) float64, from the normal distribution.

        Raises:
            CalibrationError: As for `mean`, or `level` is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise CalibrationError(f"A confidence must be between 0 and 1, not {level}.")
        reach = self.sem * statistics.NormalDist().inv_cdf((1 + level) / 2)
        return self.mean - reach, self.mean + reach

    def merge(self, other: Calibration) -> Calibration:
        """The calibration over the samples of both: exact, and the same in any order.

        Files from an older pore do not say from which weights and samples they come. They are
        merged with a warning, and the union does not say it either.

        Args:
            other: A calibration of other samples under the same conditions.

        Returns:
            The union. It can be merged again, but no longer resumed.

        Raises:
            CalibrationError: The conditions differ, or both hold a sample with the same id, picture
                and question. If only ids differ, a warning is logged.
        """
        if found := self.differences(other):
            raise CalibrationError(
                "These calibrations were made under different conditions and cannot be merged: "
                + "; ".join(found)
                + "."
            )
        if set(self.passes) & set(other.passes):
            raise CalibrationError(
                "These calibrations hold the same samples, which would count twice; split the "
                "data into shards, and merge each once."
            )
        samples = united(self.samples, other.samples)
        known = common(self._conditions, other._conditions)
        if samples is None or known["weights"] is None:
            _log.warning("A part of what is merged comes from unknown weights or samples.")
        sources = {
            source
            for one in (self, other)
            if one.provenance.source is not None
            for source in one.provenance.source.split("; ")
        }
        return replace(
            self.with_sums_of(other),
            provenance=replace(
                self.provenance,
                source="; ".join(sorted(sources)) or None,
                date=max(filter(None, (self.provenance.date, other.provenance.date)), default=None),
                **known,
            ),
            passes=tuple(sorted(self.passes + other.passes)),
            seen=self.seen + other.seen,
            bad=tuple(sorted(self.bad + other.bad)),
            samples=samples,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote, or a checkpoint, and check all of it.

        Args:
            path: The file.

        Returns:
            The calibration.

        Raises:
            CalibrationError: There is no such file, or it is damaged, too large, from another
                version or of another kind.
        """
        found = super().load(path)
        found.warn_where_unknown(path)
        return found

    def warn_where_unknown(self, path: str | os.PathLike[str]) -> None:
        """Warn if a file does not say from which weights and samples it comes."""
        if self.samples is None or self.provenance.weights is None:
            _log.warning(
                "%s does not say from which weights and pictures it comes, as it is from an older "
                "pore; that they are the present ones cannot be checked.",
                shown(path),
            )

    def document(self) -> dict[str, Any]:
        """What a file holds, but for the checksum."""
        table = None if self.table is None else self.table.document()
        plain = asdict(replace(self, table=None)) | {"provenance": self.provenance.document()}
        return self._form.document({**plain, "samples": to_text(self.samples), "table": table})

    @classmethod
    def of_document(cls, document: Any) -> Calibration:
        """The calibration in a JSON document of any origin; ValueError if it holds none."""
        return cls._form.read(document, cls._made_of)

    @classmethod
    def _made_of(cls, entries: dict[str, Any]) -> Calibration:
        passes, bad, seen, count = (entries[name] for name in ("passes", "bad", "seen", "count"))
        if not all(isinstance(one, str) for one in passes) or not passes:
            raise ValueError("passes must be digests.")
        for one in bad:
            if not (isinstance(one, list) and list(map(type, one)) == [str, str]):
                raise ValueError("bad must be pairs of id and reason.")
        if not (count >= 0 and len(bad) <= seen):
            raise ValueError("the counts contradict each other.")
        grid, sums = whole_numbers(entries["grid"], "grid"), entries["sums"]
        exact.check(sums, entries["squares"], count, grid)
        table = None if entries["table"] is None else Table.of_document(entries["table"])
        if count and not sums and table is None:
            raise ValueError("there are images, but no sums for them.")
        return cls(
            provenance=Provenance.of(entries["provenance"]),
            dtype=entries["dtype"],
            passes=tuple(passes),
            seen=seen,
            count=count,
            bad=tuple(BadSample(*one) for one in bad),
            grid=grid,
            sums=tuple(sums),
            squares=tuple(entries["squares"]),
            samples=of_text(entries["samples"], seen),
            halves=halves_of(entries["halves"], len(sums), count),
            table=table,
            heads=heads_of(entries["heads"], len(sums), count),
        )

    def images_measured(self) -> int:
        """`count`; CalibrationError if it is 0."""
        if self.count == 0:
            raise CalibrationError(
                "No image was measured, so there is no mean attention."
                + reasons(self.bad, "The samples were bad")
            )
        return self.count

    def images_of_one_size(self) -> int:
        """`count`; CalibrationError if it is 0, or if images have different sizes."""
        count = self.images_measured()
        if self.mixed:
            assert self.table is not None
            sizes = sorted(self.table.sizes)
            raise CalibrationError(
                f"The images have from {sizes[0]} to {sizes[-1]} visual tokens, so no position has "
                "a mean. Fit a bias for images of any size, with fit_any_size(), or "
                "calibrate with images of one size."
            )
        return count

    @property
    def _conditions(self) -> dict[str, Any]:
        """What must be the same in two calibrations to merge them, as far as it is known."""
        found = {name: getattr(self.provenance, name) for name in CONDITIONS}
        found["dtype"] = self.dtype
        if self.count and self.table is None:  # then images of another size cannot be added
            found |= {"positions": len(self), "grid": self.grid}
        return found

    def differences(self, other: Calibration) -> list[str]:
        """What differs between the conditions of this and another, in words."""
        return differences(self._conditions, other._conditions)

    def including(self, batch: Batch) -> Calibration:
        """The calibration with one more batch of samples."""
        state = replace(
            self,
            passes=(digest(self.passes[0], batch.samples),),
            samples=None if self.samples is None else self.samples + batch.marks,
            seen=self.seen + len(batch.samples),
            bad=(*self.bad, *batch.bad),
        )
        for rows in batch.read:
            halves = batch.halves(rows)
            joined = state._joined(PositionSums.of(rows, halves))
            table = None if state.table is None else state.table.including(rows, halves)
            count = state.count + len(rows.attention)
            state = replace(state, count=count, table=table, **joined.entries)
        return state

    def with_sums_of(self, other: Calibration) -> Calibration:
        """The calibration with the sums over the images of another as well, and nothing else."""
        known = self.table is not None and other.table is not None
        table = self.table.merged(other.table) if known else None  # type: ignore[union-attr, arg-type] # known
        joined = self._joined(other._positions) if other.count else self._positions
        count = self.count + other.count
        return replace(self, count=count, table=table, **joined.entries)

    @property
    def _positions(self) -> PositionSums:
        return PositionSums(self.grid, self.sums, self.squares, self.halves, self.heads)

    def _joined(self, new: PositionSums) -> PositionSums:
        """The sums of every position, with more images included; empty if sizes differ."""
        if not self.count:
            return new
        if self._positions.of_one_size_with(new):
            return self._positions.plus(new)
        if self.table is None:
            raise CalibrationError(
                f"The images so far have {len(self)} visual tokens on the grid {self.grid}, and "
                f"others have {len(new.sums)} on {new.grid}. Their file is from an older pore, "
                "which could not tell images of different sizes apart: begin again."
            )
        return PositionSums()
