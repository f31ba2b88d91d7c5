"""P of every host in a survey: measured once for all budgets, and fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pore.bias.position_bias import PositionBias
from pore.calibration.calibrating import calibrate
from pore.calibration.fits import FitKind, Mean
from pore.calibration.host import HostCalibration
from pore.calibration.page import Drawn
from pore.calibration.reading import attention_stages
from pore.calibration.sums import Calibration
from pore.data.samples import Sample
from pore.engine.pruner import Pruner
from pore.engine.readers import LastToken
from pore.errors import ProfileError, StaleCheckpointError
from pore.evaluation.guided import guiding_of
from pore.evaluation.results import SurveySettings
from pore.evaluation.store import digest, slug

_LONGEST_NAME = 240  # file systems allow 255 bytes, suffix included


_OTHERWISE: tuple[FitKind, ...] = ("spline", "empirical")


@dataclass(frozen=True)
class HostMeasure:
    """How to measure the attention that a host divides by P.

    Attributes:
        host: The host's name.
        name: The host and the layers that it looks at, as a file name; the same at all its budgets.
        cost: Cost of a sample, in units of asking the unpruned model one question.
        take: Measures; takes samples and the arguments common to `calibrate` and
            `calibrate_guide`.
        tells_heads: Whether heads can be told apart: the attention of the last token ranks.
    """

    host: str
    name: str
    cost: float
    take: Callable[..., Calibration | HostCalibration]
    tells_heads: bool = False

    def fit(
        self,
        samples: Callable[[], Iterable[Sample]],
        checkpoint: Path,
        settings: SurveySettings,
        *,
        source: str,
        any_size: bool = False,
    ) -> tuple[Drawn, ...]:
        """Measure on samples, or resume an interrupted measurement, and fit P.

        Args:
            samples: Gives the samples, anew at each call.
            checkpoint: File of the sums; those of another model or other samples are replaced.
            settings: Size of a batch, share of bad samples to skip, and the form of P.
            source: Where the samples come from, for the provenance.
            any_size: Whether the model takes images of any size.

        Returns:
            P of every stage, in the requested form or else in the next form that fits; for images
            of any size, the power of the distance.
        """
        stages = self.measured(samples, checkpoint, settings, source=source)
        if any_size:
            return tuple(stage.fit_any_size() for stage in stages)
        return tuple(fitted(stage, settings.kind) for stage in stages)

    def measured(
        self,
        samples: Callable[[], Iterable[Sample]],
        checkpoint: Path,
        settings: SurveySettings,
        *,
        source: str,
        heads: bool = False,
    ) -> tuple[Calibration, ...]:
        """Measure on samples, or resume an interrupted measurement.

        Args:
            samples: As in `fit`.
            checkpoint: As in `fit`.
            settings: As in `fit`.
            source: As in `fit`.
            heads: Whether to keep the sums of every head too, where heads can be told apart.

        Returns:
            The sums of every stage.
        """
        if heads and self.tells_heads:
            return replace(self, take=partial(self.take, heads=True)).measured(
                samples, checkpoint, settings, source=source
            )
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
        return measured.stages if isinstance(measured, HostCalibration) else (measured,)


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
    stages = attention_stages(host)
    read = [stage.reads_layer or 0 for stage in stages]
    named = f"{name}-{'-'.join(map(str, read))}"
    if len(named) > _LONGEST_NAME:  # as in a model with a hundred layers that are all read
        named = f"{named[:100]}-{digest(read)[:8]}"
    depth = 0.25 + 0.75 * max(read) / layers  # the decoder runs up to the last layer looked at
    take = partial(calibrate, model, processor, host=host)
    by_head = all(type(stage.attention) is LastToken for stage in stages)
    return HostMeasure(host.name, named, depth, take, by_head)


def fitted(measured: Calibration, kind: FitKind, mean: Mean = "arithmetic") -> PositionBias:
    """P in the requested form, or in the next one if no curve of that form fits."""
    for form in (kind, *_OTHERWISE):
        try:
            return measured.fit(form, mean)
        except ProfileError as error:
            refused = error
    raise refused
