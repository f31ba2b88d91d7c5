"""Calibrations of all the stages of a host method."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pore._files import write_atomic
from pore._saved.seals import check, seal, sealed_text
from pore.bias.position_bias import Kind, PositionBias
from pore.calibration.sums import (
    _HOST_SCHEMA,
    _SCHEMA,
    _VERSION,
    BadSample,
    Calibration,
    _check_fields,
    _decode,
    _load,
)
from pore.errors import CalibrationError, ProfileError, ScoreError
from pore.layout import Layout
from pore.methods.guides import Guide

if TYPE_CHECKING:
    from pore.data.samples import Sample


_MAX_STAGES = 1 << 10


@dataclass(frozen=True)
class HostCalibration:
    """The calibrations of all stages of a host method that read attention, from one pass.

    Attributes:
        stages: One for every such stage, in the order of `host.stages()`.
    """

    stages: tuple[Calibration, ...]

    @property
    def seen(self) -> int:
        """Samples gone through, bad ones included."""
        return self.stages[0].seen

    @property
    def count(self) -> int:
        """Images whose attention is in the sums."""
        return self.stages[0].count

    @property
    def bad(self) -> tuple[BadSample, ...]:
        """The samples skipped, with the reason."""
        return self.stages[0].bad

    def fit(self, kind: Kind = "exponential") -> tuple[PositionBias, ...]:
        """The position bias of every stage, for the host's `reweight`.

        Args:
            kind: Form of the curves, as in `PositionBias.fit`.

        Returns:
            One bias for every stage.

        Raises:
            CalibrationError: No image was measured.
            PoreError: A curve cannot be fitted; see `PositionBias.fit`.
        """
        biases = []
        for stage in self.stages:
            try:
                biases.append(stage.fit(kind))
            except (ProfileError, ScoreError) as error:
                layer = stage.provenance.layer
                where = "the model that guides" if layer is None else f"decoder layer {layer - 1}"
                raise type(error)(f"What is read of {where}: {error}") from error
        return tuple(biases)

    def merge(self, other: HostCalibration) -> HostCalibration:
        """The calibration over the samples of both; see `Calibration.merge`.

        Args:
            other: A calibration of other samples under the same conditions.

        Returns:
            The union.

        Raises:
            CalibrationError: The conditions differ, or both hold the same pass over samples.
        """
        if len(self.stages) != len(other.stages):
            raise CalibrationError(
                f"These calibrations have {len(self.stages)} and {len(other.stages)} stages, so "
                "they are of different hosts and cannot be merged."
            )
        pairs = zip(self.stages, other.stages, strict=True)
        return HostCalibration(tuple(one.merge(another) for one, another in pairs))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the calibration to a JSON file, whole or not at all.

        Args:
            path: The file; missing folders are made. With one stage it is a `Calibration` file.

        Returns:
            The path written.

        Raises:
            OSError: It cannot be written.
        """
        if len(self.stages) == 1:
            return self.stages[0].save(path)
        stages = [seal(stage._document()) for stage in self.stages]
        document = {"schema": _HOST_SCHEMA, "version": _VERSION, "stages": stages}
        return write_atomic(path, sealed_text(document))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HostCalibration:
        """Read what `save` or `Calibration.save` wrote, or a checkpoint; trusted in nothing.

        Args:
            path: The file.

        Returns:
            The calibration.

        Raises:
            CalibrationError: There is no such file, or it is damaged, too large, of another
                version or something else altogether.
        """
        return _load(path, _decode_host)

    def _including(
        self,
        samples: Sequence[Sample],
        marks: bytes,
        measured: Sequence[tuple[Layout | Guide, np.ndarray]],
        bad: Sequence[BadSample],
    ) -> HostCalibration:
        """With one more batch of samples, of which `marks` tell, some measured and some bad."""
        return HostCalibration(
            tuple(
                stage._including(
                    samples, marks, [(layout, rows[i]) for layout, rows in measured], bad
                )
                for i, stage in enumerate(self.stages)
            )
        )


_HOST_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "schema": str,
    "version": int,
    "stages": list,
}


def _decode_host(document: Any) -> HostCalibration:
    """The calibration of a host from JSON of any origin, or ValueError."""
    if isinstance(document, dict) and document.get("schema") == _SCHEMA:
        return HostCalibration((_decode(document),))
    found = _check_fields(document, _HOST_SCHEMA, _HOST_FIELDS)
    if not 1 <= len(found["stages"]) <= _MAX_STAGES:
        raise ValueError(f"there must be 1 to {_MAX_STAGES} stages.")
    stages = tuple(map(_decode, found["stages"]))
    passes = {(s.passes, s.seen, s.count, s.bad, s.grid, len(s), s.samples) for s in stages}
    if len(passes) != 1:
        raise ValueError("its stages have not seen the same samples.")
    check(document)
    return HostCalibration(stages)
