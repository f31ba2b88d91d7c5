"""The calibrations of all stages of a host method."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from pore._saved.forms import Form
from pore._saved.saved import Saved
from pore._saved.stages import STAGES, document_of, stages_of
from pore.bias.any_size import AnySizeBias
from pore.bias.coordinates import Over
from pore.bias.curve import Kind
from pore.bias.position_bias import PositionBias
from pore.calibration.batch import BadSample, Batch
from pore.calibration.diagnosis import Diagnosis
from pore.calibration.fits import FitKind, Mean, of_part, part_read
from pore.calibration.seen import one_by_one
from pore.calibration.stability import TIMES, Stability
from pore.calibration.sums import SEVERAL, Calibration
from pore.corrections.heads import HeadBiases
from pore.errors import CalibrationError

_Fitted = TypeVar("_Fitted")


@dataclass(frozen=True)
class HostCalibration(Saved):
    """The calibrations of all stages of a host method that read attention, from one pass.

    Attributes:
        stages: One for every such stage, in the order of `host.stages()`.
    """

    stages: tuple[Calibration, ...]

    _form: ClassVar[Form] = Form(
        schema=SEVERAL, what="calibration", error=CalibrationError, entries=STAGES, most=256 << 20
    )

    @property
    def seen(self) -> int:
        """Number of samples processed, including bad ones."""
        return self.stages[0].seen

    @property
    def count(self) -> int:
        """Number of images whose attention is in the sums."""
        return self.stages[0].count

    @property
    def bad(self) -> tuple[BadSample, ...]:
        """The samples skipped, with the reason."""
        return self.stages[0].bad

    @property
    def mixed(self) -> bool:
        """Whether images had different sizes, so that no position has a mean."""
        return self.stages[0].mixed

    def fit(
        self, kind: FitKind = "exponential", mean: Mean = "arithmetic"
    ) -> tuple[PositionBias, ...]:
        """The position bias of every stage, for the host's `reweight`.

        Args:
            kind: Form of the curves, as in `Calibration.fit`.

        Returns:
            One bias for every stage.

        Raises:
            CalibrationError: No image was measured, or images have different sizes.
            PoreError: A curve cannot be fitted; see `Calibration.fit`.
        """
        return self._of_every(lambda stage: stage.fit(kind, mean))

    def fit_any_size(
        self, kind: FitKind | None = None, over: Over = "distance"
    ) -> tuple[AnySizeBias, ...]:
        """The position bias of every stage for images of any size, for the host's `reweight`.

        Args:
            kind: Form of the curves, as in `Calibration.fit`.
            over: What P is a function of, see `AnySizeBias`.

        Raises:
            CalibrationError: No image was measured, or the file is from an older pore.
            PoreError: A curve cannot be fitted.
        """
        return self._of_every(lambda stage: stage.fit_any_size(kind, over))

    def fit_heads(
        self, kind: Kind = "exponential", mean: Mean = "arithmetic"
    ) -> tuple[HeadBiases, ...]:
        """The position biases of every stage's heads, for the host's `reweight`.

        Args:
            kind: Form of the curves, as in `PositionBias.fit`.

        Raises:
            CalibrationError: As in `fit`, or heads were not summed separately.
            PoreError: A curve cannot be fitted.
        """
        return self._of_every(lambda stage: stage.fit_heads(kind, mean))

    def diagnose(
        self, kind: FitKind = "auto", keep: int | float = 0.25, mean: Mean = "arithmetic"
    ) -> tuple[Diagnosis, ...]:
        """Whether the position bias of every stage will help; see `Calibration.diagnose`.

        Args:
            kind: Form of the curves, as in `Calibration.fit`.
            keep: How many visual tokens will be kept, or which share of them.

        Raises:
            PoreError: As in `Calibration.diagnose`.
        """
        return self._of_every(lambda stage: stage.diagnose(kind, keep, mean))

    def diagnose_any_size(
        self, kind: FitKind = "auto", over: Over = "distance", keep: int | float = 0.25
    ) -> tuple[Diagnosis, ...]:
        """The same for images of any size; see `Calibration.diagnose_any_size`.

        Args:
            kind: Form of the curves, as in `Calibration.fit`.
            over: What they are a function of, see `AnySizeBias`.
            keep: How many visual tokens will be kept, or which share of them.

        Raises:
            PoreError: As in `Calibration.diagnose_any_size`.
        """
        return self._of_every(lambda stage: stage.diagnose_any_size(kind, over, keep))

    def stability(
        self,
        kind: FitKind = "auto",
        keep: int | float = 0.25,
        mean: Mean = "arithmetic",
        over: Over | None = None,
        times: Sequence[float] = TIMES,
    ) -> tuple[Stability, ...]:
        """How many images are enough for P of every stage; see `Calibration.stability`.

        Args:
            kind: Form of the curves, as in `Calibration.fit`.
            keep: How many visual tokens will be kept, or which share of them.
            mean: As in `Calibration.fit`.
            over: For images of any size what P is a function of.
            times: The numbers of images to ask about, as multiples of the number measured.

        Raises:
            PoreError: As in `Calibration.stability`.
        """
        return self._of_every(lambda stage: stage.stability(kind, keep, mean, over, times))

    def _of_every(self, fit: Callable[[Calibration], _Fitted]) -> tuple[_Fitted, ...]:
        found = []
        for stage in self.stages:
            with of_part(part_read(stage.provenance.layer)):
                found.append(fit(stage))
        return tuple(found)

    def merge(self, other: HostCalibration) -> HostCalibration:
        """The calibration over the samples of both; see `Calibration.merge`.

        Args:
            other: A calibration of other samples under the same conditions.

        Returns:
            The union.

        Raises:
            CalibrationError: The conditions differ, or both hold the same samples.
        """
        if len(self.stages) != len(other.stages):
            raise CalibrationError(
                f"These calibrations have {len(self.stages)} and {len(other.stages)} stages, so "
                "they belong to different hosts and cannot be merged."
            )
        pairs = zip(self.stages, other.stages, strict=True)
        return HostCalibration(tuple(one.merge(another) for one, another in pairs))

    def document(self) -> dict[str, Any]:
        """What a file holds; with one stage, the same as for a `Calibration`."""
        return document_of(self._form, self.stages)

    @classmethod
    def of_document(cls, document: Any) -> HostCalibration:
        """The calibrations in a JSON document of any origin; ValueError if it holds none."""
        found = stages_of(cls._form, document, Calibration)
        passes = {(s.passes, s.seen, s.count, s.bad, s.grid, len(s), s.samples) for s in found}
        if len(passes) != 1:
            raise ValueError("its stages were not read from the same samples.")
        return cls(found)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HostCalibration:
        """Read what `save` or `Calibration.save` wrote, or a checkpoint, and check all of it.

        Args:
            path: The file.

        Returns:
            The calibration.

        Raises:
            CalibrationError: There is no such file, or it is damaged, too large, from another
                version or of another kind.
        """
        found = super().load(path)
        found.stages[0].warn_where_unknown(path)
        return found

    def differences(self, other: HostCalibration) -> list[str]:
        """What differs between the conditions of this and another, in words, each once."""
        found = []
        if len(self.stages) != len(other.stages):
            found = [f"there are {len(self.stages)} stages here and {len(other.stages)} there"]
        for one, another in zip(self.stages, other.stages, strict=False):
            found += one.differences(another)
        return list(dict.fromkeys(found))

    def including(self, batch: Batch) -> HostCalibration:
        """The calibration with one more batch of samples, read by every stage.

        Args:
            batch: Its attention is (S, n, N), for S stages.
        """
        return HostCalibration(
            tuple(
                stage.including(batch._replace(read=[rows.stage(i) for rows in batch.read]))
                for i, stage in enumerate(self.stages)
            )
        )

    def followed_by(
        self, shares: Sequence[HostCalibration], marks: bytes, bad: Sequence[BadSample], then: str
    ) -> HostCalibration:
        """The calibration with the samples that follow, which several measured.

        Args:
            shares: Calibrations of parts of these samples, of which only the sums are taken.
            marks: The marks of the samples, in their order.
            bad: Those of the samples that were skipped, in their order.
            then: The digest of the pass after them.
        """
        before = self.stages[0].samples
        about: dict[str, Any] = {
            "passes": (then,),
            "samples": None if before is None else before + marks,
            "seen": self.seen + len(one_by_one(marks)),
            "bad": (*self.bad, *bad),
        }
        stages = list(self.stages)
        for share in shares:
            stages = [a.with_sums_of(b) for a, b in zip(stages, share.stages, strict=True)]
        return HostCalibration(tuple(replace(stage, **about) for stage in stages))
