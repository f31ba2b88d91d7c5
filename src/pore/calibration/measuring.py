"""Measures one batch of samples: the attention of the good ones, and why the others are bad."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pore._compat.weights import execution_device
from pore.calibration.batch import BadSample
from pore.calibration.exact import LARGEST
from pore.calibration.reading import Reader, Reading
from pore.calibration.table import Rows
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

    @classmethod
    def of(cls, model: nn.Module, processor: Any, reader: Reader) -> Subject:
        """A model where it is and as it is."""
        dtype: torch.dtype = model.dtype  # type: ignore[assignment]
        return cls(model, processor, reader, _device(model), dtype)


class Measured(NamedTuple):
    """The measurements of some samples.

    Attributes:
        read: What all stages read for their images, grouped by size.
        bad: The samples that could not be measured.
    """

    read: list[Rows]
    bad: list[BadSample]


def measure(subject: Subject, samples: Sequence[Sample]) -> Measured:
    """Measure samples together; a bad one does not affect the others.

    Args:
        subject: What is measured.
        samples: The samples.

    Returns:
        The measurements.

    Raises:
        CalibrationError: What is read is not attention.
    """
    return _measured(subject, list(enumerate(samples)))


def _measured(subject: Subject, samples: Sequence[tuple[int, Sample]]) -> Measured:
    """Measure samples together, each with its number in the batch."""
    good: list[tuple[int, Sample]] = []
    bad: list[BadSample] = []
    for number, sample in samples:
        try:
            good.append((number, _loaded(sample)))
        except InputError as error:
            bad.append(BadSample(sample.id, str(error)))
    if not good:
        return Measured([], bad)
    together = [sample for _, sample in good]
    try:
        inputs = build_inputs(subject.processor, together, subject.device, subject.dtype)
        reading = subject.reader.read(subject.model, inputs)
    except InputError as error:
        if len(good) == 1:
            return Measured([], [*bad, BadSample(together[0].id, str(error))])
        alone = [_measured(subject, [one]) for one in good]
        return Measured(
            [each for one in alone for each in one.read],
            [*bad, *(each for one in alone for each in one.bad)],
        )
    rows, finite = _checked(reading, subject.reader.host)
    spoiled = {image.row for image, fine in zip(reading.images, finite, strict=True) if not fine}
    bad += [BadSample(together[row].id, NOT_FINITE) for row in sorted(spoiled)]
    fine = [i for i, image in enumerate(reading.images) if image.row not in spoiled]
    return Measured(_by_size(reading, rows, fine, [number for number, _ in good]), bad)


def _loaded(sample: Sample) -> Sample:
    """A sample with its image or video loaded, of which there must be one."""
    if sample.image is None:
        sample.load_image()  # says that there is none
    return replace(sample, image=sample.load())


def _by_size(
    reading: Reading, rows: np.ndarray, fine: Sequence[int], numbers: Sequence[int]
) -> list[Rows]:
    """What was read for some images, grouped by size.

    Args:
        reading: The reading of all images.
        rows: (S, I, t) what the stages read.
        fine: Which images to take.
        numbers: For every prompt, the number of its sample.
    """
    sizes: dict[tuple[tuple[int, int] | None, int], list[int]] = {}
    for i in fine:
        image = reading.images[i]
        sizes.setdefault((image.grid, len(image.columns)), []).append(i)
    distance, place = _numbers(reading.distance).astype(int), _places(reading)
    heads = None if reading.heads is None else np.stack([_numbers(x) for x in reading.heads])
    return [
        Rows(
            grid,
            rows[:, images, :tokens],
            np.array([numbers[reading.images[i].row] for i in images]),
            distance[images, :tokens],
            None if place is None else place[images, :tokens],
            None if heads is None else heads[:, images, :, :tokens],
        )
        for (grid, tokens), images in sizes.items()
    ]


def _places(reading: Reading) -> np.ndarray | None:
    return None if reading.place is None else _numbers(reading.place)


def _checked(reading: Reading, host: str) -> tuple[np.ndarray, np.ndarray]:
    """The (S, I, t) numbers of a reading, 0 where an image is smaller, and (I,) whether all numbers
    of an image are finite."""
    if any(curve.shape != reading.valid.shape for curve in reading.curves):
        raise CalibrationError(
            f"The stages of {host} read {[tuple(curve.shape) for curve in reading.curves]} for "
            f"visual tokens of shape {tuple(reading.valid.shape)}; the reader, or the stage's "
            "curve, must give one number for every token."
        )
    rows = np.stack([_numbers(curve.masked_fill(~reading.valid, 0.0)) for curve in reading.curves])
    finite = np.isfinite(rows).all(axis=(0, 2))
    known = rows[:, finite]
    if (known < 0).any() or (known > LARGEST).any():
        raise CalibrationError(
            f"What {host} reads is not attention: it runs from {known.min():g} to "
            f"{known.max():g}, but must be from 0 to 2^30."
        )
    return rows, finite


def _numbers(x: Tensor) -> np.ndarray:
    found: np.ndarray = x.to("cpu", torch.float64).numpy()
    return found


def _device(model: nn.Module) -> torch.device:
    """Where the model takes its inputs."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    device: torch.device = embeddings.weight.device
    if device.type == "meta":  # offloaded by accelerate, which knows where it will compute
        device = execution_device(embeddings)
    return device
