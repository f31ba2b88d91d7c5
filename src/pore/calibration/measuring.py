"""What one batch of samples gives: the attention of the good ones, and why the others are bad."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from pore.calibration.exact import LARGEST
from pore.calibration.reading import Reader, Reading
from pore.calibration.sums import BadSample
from pore.data.prompts import build_inputs
from pore.data.samples import Sample
from pore.errors import CalibrationError, InputError

NOT_FINITE = "its attention is NaN or infinite"


class Subject(NamedTuple):
    """What is measured, and how.

    Attributes:
        model: The model.
        processor: Its processor.
        reader: What reads the model.
        device: Where the model takes its inputs.
        dtype: The floating type of its inputs.
    """

    model: nn.Module
    processor: Any
    reader: Reader
    device: torch.device
    dtype: torch.dtype


class Measured(NamedTuple):
    """What some samples gave.

    Attributes:
        read: Of those measured together, the grid, and the (S, n, N) attention of S stages.
        bad: Those that gave nothing.
    """

    read: list[tuple[tuple[int, int] | None, np.ndarray]]
    bad: list[BadSample]


def measure(subject: Subject, samples: Sequence[Sample]) -> Measured:
    """Measure samples together; bad ones spoil no other.

    Args:
        subject: What is measured.
        samples: The samples.

    Returns:
        What they gave.

    Raises:
        CalibrationError: Images differ in their number of visual tokens, or what is read is no
            attention.
    """
    good: list[Sample] = []
    bad: list[BadSample] = []
    for sample in samples:
        try:
            good.append(replace(sample, image=sample.load_image()))
        except InputError as error:
            bad.append(BadSample(sample.id, str(error)))
    if not good:
        return Measured([], bad)
    try:
        inputs = build_inputs(subject.processor, good, subject.device, subject.dtype)
        reading = subject.reader.read(subject.model, inputs)
    except InputError as error:
        if len(good) == 1:
            return Measured([], [*bad, BadSample(good[0].id, str(error))])
        alone = [measure(subject, [sample]) for sample in good]
        return Measured(
            [each for one in alone for each in one.read],
            [*bad, *(each for one in alone for each in one.bad)],
        )
    rows, finite = _checked(reading, subject.reader.host, good)
    spoiled = {image.row for image, fine in zip(reading.images, finite, strict=True) if not fine}
    bad += [BadSample(good[row].id, NOT_FINITE) for row in sorted(spoiled)]
    keep = [image.row not in spoiled for image in reading.images]
    return Measured([(reading.images[0].grid, rows[:, keep])] if any(keep) else [], bad)


def _checked(
    reading: Reading, host: str, samples: Sequence[Sample]
) -> tuple[np.ndarray, np.ndarray]:
    """The (S, I, t) numbers of a reading, and the (I,) images where all are finite."""
    if not bool(reading.valid.all()):
        raise CalibrationError(
            f"The images of {', '.join(sample.id for sample in samples)} have different numbers of "
            "visual tokens. A position bias is of one grid: calibrate with images of one size."
        )
    if any(curve.shape != reading.valid.shape for curve in reading.curves):
        raise CalibrationError(
            f"The stages of {host} read {[tuple(curve.shape) for curve in reading.curves]} of "
            f"visual tokens of shape {tuple(reading.valid.shape)}; the reader, or the stage's "
            "curve, must give one number for every token."
        )
    rows = np.stack([curve.to("cpu", torch.float64).numpy() for curve in reading.curves])
    finite = np.isfinite(rows).all(axis=(0, 2))
    known = rows[:, finite]
    if (known < 0).any() or (known > LARGEST).any():
        raise CalibrationError(
            f"What {host} reads is no attention: it runs from {known.min():g} to "
            f"{known.max():g}, where 0 to 2^30 can be."
        )
    return rows, finite
