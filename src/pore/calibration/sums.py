"""The mean attention over a data set, as sums that are exact, mergeable and saved."""

from __future__ import annotations

import logging
import math
import operator
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pore._files import shown
from pore._saved.forms import Form, whole_numbers
from pore._saved.saved import Saved
from pore.bias.curve import Kind
from pore.bias.position_bias import PositionBias
from pore.bias.provenance import Provenance
from pore.calibration import exact
from pore.calibration.conditions import CONDITIONS, common, differences
from pore.calibration.seen import digest, of_text, to_text, united
from pore.data.samples import Sample
from pore.errors import CalibrationError

_log = logging.getLogger("pore.calibration")


SEVERAL = "pore.host_calibration"


"""The schema of the calibrations of several stages; see `HostCalibration`."""


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
    },
    most=256 << 20,
    absent={"samples": None},
    elsewhere={SEVERAL: "it is of several stages; read it with HostCalibration.load."},
)


class BadSample(NamedTuple):
    """A sample that was skipped.

    Attributes:
        id: The sample's id.
        reason: What was wrong with it.
    """

    id: str
    reason: str


class Batch(NamedTuple):
    """What came of some samples that follow those gone through.

    Attributes:
        samples: The samples.
        marks: What tells of each, see `pore.calibration.seen`.
        read: Of those measured together, the grid, and the (n, N) attention of their n images.
        bad: Those skipped.
    """

    samples: Sequence[Sample]
    marks: bytes
    read: Sequence[tuple[tuple[int, int] | None, np.ndarray]]
    bad: Sequence[BadSample]


@dataclass(frozen=True)
class Calibration(Saved):
    """Sums over a data set of the attention on every visual position, and how they came about.

    Attributes:
        provenance: The conditions of the measurement, its date and source.
        dtype: The model's floating type, such as "float32".
        passes: For each pass over samples that is in here, a digest of the samples in order.
        seen: Samples gone through, bad ones included.
        count: Images whose attention is in the sums.
        bad: The samples skipped, with the reason.
        grid: Rows and columns of the visual tokens, where known.
        sums: For each of the N positions the sum of the attention, in units of 2⁻⁶²; empty before
            the first image.
        squares: The sum of its square, in units of 2⁻¹²⁴.
        samples: Of every sample gone through, 8 bytes for its picture and prompt and 4 for its id,
            in order; None where it is unknown, as in files of an older pore.
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

    _form: ClassVar[Form] = _FORM

    def __len__(self) -> int:
        return len(self.sums)

    @property
    def mean(self) -> Tensor:
        """Ā of every position, of shape (N,), float64.

        Raises:
            CalibrationError: No image was measured.
        """
        return torch.tensor(exact.mean(self.sums, self.images_measured()), dtype=torch.float64)

    @property
    def std(self) -> Tensor:
        """Standard deviation of the attention over images, (N,) float64; NaN for one image.

        Raises:
            CalibrationError: No image was measured.
        """
        count = self.images_measured()
        if count == 1:
            return torch.full((len(self),), torch.nan, dtype=torch.float64)
        found = exact.deviation(self.sums, self.squares, count)
        return torch.tensor(found, dtype=torch.float64)

    @property
    def sem(self) -> Tensor:
        """Standard error of the mean, (N,) float64; NaN for one image.

        Raises:
            CalibrationError: No image was measured.
        """
        return self.std / math.sqrt(self.images_measured())

    def band(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """The confidence band of the mean at each position, images taken as independent.

        Args:
            level: Confidence, between 0 and 1.

        Returns:
            Lower and upper bound, each (N,) float64, from the normal distribution.

        Raises:
            CalibrationError: No image was measured, or `level` is no confidence.
        """
        if not 0 < level < 1:
            raise CalibrationError(f"A confidence lies between 0 and 1, {level} does not.")
        reach = self.sem * statistics.NormalDist().inv_cdf((1 + level) / 2)
        return self.mean - reach, self.mean + reach

    def fit(self, kind: Kind = "exponential") -> PositionBias:
        """The position bias that fits the mean attention, with its provenance.

        Args:
            kind: Form of the curve, as in `PositionBias.fit`.

        Returns:
            The bias.

        Raises:
            CalibrationError: No image was measured.
            PoreError: The curve cannot be fitted; see `PositionBias.fit`.
        """
        provenance = replace(self.provenance, samples=self.images_measured())
        return PositionBias.fit(self.mean, kind, grid=self.grid, provenance=provenance)

    def merge(self, other: Calibration) -> Calibration:
        """The calibration over the samples of both: exact, and the same in any order.

        Files of an older pore do not say which weights and samples they are of. They are merged
        with a warning, and the union does not say it either.

        Args:
            other: A calibration of other samples under the same conditions.

        Returns:
            The union. It can be merged on, but no longer resumed.

        Raises:
            CalibrationError: The conditions differ, or both hold the same sample: of one id, with
                one picture and one question. Where ids differ, a warning is logged.
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
            _log.warning("Of what is merged, a part is of unknown weights or samples.")
        sources = {
            source
            for one in (self, other)
            if one.provenance.source is not None
            for source in one.provenance.source.split("; ")
        }
        both = [one for one in (self, other) if one.count]
        return replace(
            self,
            provenance=replace(
                self.provenance,
                source="; ".join(sorted(sources)) or None,
                date=max(filter(None, (self.provenance.date, other.provenance.date)), default=None),
                **known,
            ),
            passes=tuple(sorted(self.passes + other.passes)),
            seen=self.seen + other.seen,
            count=self.count + other.count,
            bad=tuple(sorted(self.bad + other.bad)),
            grid=both[0].grid if both else None,
            sums=tuple(map(sum, zip(*(one.sums for one in both), strict=True))),
            squares=tuple(map(sum, zip(*(one.squares for one in both), strict=True))),
            samples=samples,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote, or a checkpoint; trusted in nothing.

        Args:
            path: The file.

        Returns:
            The calibration.

        Raises:
            CalibrationError: There is no such file, or it is damaged, too large, of another
                version or something else altogether.
        """
        found = super().load(path)
        found.warn_where_unknown(path)
        return found

    def warn_where_unknown(self, path: str | os.PathLike[str]) -> None:
        """Warn that a file does not say which weights and samples it is of, where it does not."""
        if self.samples is None or self.provenance.weights is None:
            _log.warning(
                "%s does not say which weights and pictures it is of, as files of an older pore do "
                "not; that they are those at hand cannot be checked.",
                shown(path),
            )

    def document(self) -> dict[str, Any]:
        """What a file holds, but for the checksum."""
        return self._form.document({**asdict(self), "samples": to_text(self.samples)})

    @classmethod
    def of_document(cls, document: Any) -> Calibration:
        """The calibration that a JSON document of any origin holds, or ValueError."""
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
        grid = whole_numbers(entries["grid"], "grid")
        exact.check(entries["sums"], entries["squares"], count, grid)
        return cls(
            provenance=Provenance.of(entries["provenance"]),
            dtype=entries["dtype"],
            passes=tuple(passes),
            seen=seen,
            count=count,
            bad=tuple(BadSample(*one) for one in bad),
            grid=grid,
            sums=tuple(entries["sums"]),
            squares=tuple(entries["squares"]),
            samples=of_text(entries["samples"], seen),
        )

    def images_measured(self) -> int:
        """`count`, or CalibrationError where there is none."""
        if self.count == 0:
            raise CalibrationError(
                "No image was measured, so there is no mean attention."
                + reasons(self.bad, "The samples were bad")
            )
        return self.count

    @property
    def _conditions(self) -> dict[str, Any]:
        """What must be the same in two calibrations that belong together, as far as it is known."""
        found = {name: getattr(self.provenance, name) for name in CONDITIONS}
        found["dtype"] = self.dtype
        return {**found, "positions": len(self), "grid": self.grid} if self.count else found

    def differences(self, other: Calibration) -> list[str]:
        """What differs in the conditions of this and another, in words."""
        return differences(self._conditions, other._conditions)

    def including(self, batch: Batch) -> Calibration:
        """With one more batch of samples."""
        state = replace(
            self,
            passes=(digest(self.passes[0], batch.samples),),
            samples=None if self.samples is None else self.samples + batch.marks,
            seen=self.seen + len(batch.samples),
            bad=(*self.bad, *batch.bad),
        )
        for grid, rows in batch.read:
            if not state.count:
                nothing = (0,) * rows.shape[1]
                state = replace(state, grid=grid, sums=nothing, squares=nothing)
            if rows.shape[1] != len(state) or grid != state.grid:
                raise CalibrationError(
                    f"The images so far have {len(state)} visual tokens on the grid {state.grid}, "
                    f"and one of {', '.join(s.id for s in batch.samples)} has {rows.shape[1]} on "
                    f"{grid}. A position bias is of one grid: calibrate with images of one size."
                )
            units = exact.units(rows)
            state = replace(
                state,
                count=state.count + len(units),
                sums=tuple(map(operator.add, state.sums, units.sum(0))),
                squares=tuple(map(operator.add, state.squares, (units * units).sum(0))),
            )
        return state


def reasons(bad: Sequence[BadSample], opening: str) -> str:
    """Why the first bad samples are bad, as a sentence; nothing where none is."""
    if not bad:
        return ""
    listed = "; ".join(f"{one.id}: {one.reason}" for one in bad[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f" {opening}: {listed}{more}"
