"""P of every host in a survey: measured once for all budgets, and fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pore.bias.curve import Kind
from pore.bias.position_bias import PositionBias
from pore.calibration.calibrating import calibrate
from pore.calibration.host import HostCalibration
from pore.calibration.reading import attention_stages
from pore.calibration.sums import Calibration
from pore.data.samples import Sample
from pore.engine.pruner import Pruner
from pore.errors import ProfileError, StaleCheckpointError
from pore.evaluation.guided import guiding_of
from pore.evaluation.results import SurveySettings
from pore.evaluation.store import digest, slug

_LONGEST_NAME = 240  # file systems allow 255 bytes, suffix included


_OTHERWISE: tuple[Kind, ...] = ("spline", "empirical")


@dataclass(frozen=True)
class HostMeasure:
    """How to measure the attention that a host divides by P.

    Attributes:
        host: The host's name.
        name: The host and the layers that it looks at, as a file name; the same at all its budgets.
        cost: Cost of a sample, in units of asking the unpruned model one question.
        take: Measures; takes samples and the arguments common to `calibrate` and
            `calibrate_guide`.
    """

    host: str
    name: str
    cost: float
    take: Callable[..., Calibration | HostCalibration]

    def fit(
        self,
        samples: Callable[[], Iterable[Sample]],
        checkpoint: Path,
        settings: SurveySettings,
        *,
        source: str,
    ) -> tuple[PositionBias, ...]:
        """Measure on samples, or resume an interrupted measurement, and fit P.

        Args:
            samples: Gives the samples, anew at each call.
            checkpoint: File of the sums; those of another model or other samples are replaced.
            settings: Size of a batch, share of bad samples to skip, and the form of P.
            source: Where the samples come from, for the provenance.

        Returns:
            P of every stage, in the requested form or else in the next form that fits.
        """
        take = partial(
            self.take,
            batch_size=settings.batch_size,
            checkpoint=checkpoint,
            max_bad=settings.max_bad,
            progress=False,
            source=source,
        )
        try:
            measured = take(samples())
        except StaleCheckpointError:
            checkpoint.unlink()
            measured = take(samples())
        stages = measured.stages if isinstance(measured, HostCalibration) else (measured,)
        return tuple(fitted(stage, settings.kind) for stage in stages)


def host_measure(host: Pruner, model: Any, processor: Any, layers: int) -> HostMeasure:
    """How to measure a host: in its guide, or at the layers that its stages read.

    Args:
        host: The method, with or without P.
        model: The model that it prunes.
        processor: Its processor.
        layers: Its decoder layers.

    Returns:
        What measures it.
    """
    name = slug(host.name)
    if (guiding := guiding_of(host)) is not None:
        name = f"{name}-{digest(guiding.conditions)[:8]}"
        return HostMeasure(host.name, name, 1.0, guiding.calibrate)
    read = [stage.reads_layer or 0 for stage in attention_stages(host)]
    named = f"{name}-{'-'.join(map(str, read))}"
    if len(named) > _LONGEST_NAME:  # as in a model with a hundred layers that are all read
        named = f"{named[:100]}-{digest(read)[:8]}"
    depth = 0.25 + 0.75 * max(read) / layers  # the decoder runs up to the last layer looked at
    return HostMeasure(host.name, named, depth, partial(calibrate, model, processor, host=host))


def fitted(measured: Calibration, kind: Kind) -> PositionBias:
    """P in the requested form, or in the next one if no curve of that form fits."""
    for form in (kind, *_OTHERWISE):
        try:
            return measured.fit(form)
        except ProfileError as error:
            refused = error
    raise refused
