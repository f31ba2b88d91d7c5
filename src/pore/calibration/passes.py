"""The mean attention Ā over a data set, which the position bias P is fitted to.

The stages of a host method read the attention of the unpruned model, each what it would divide by
P, and keep everything. Only the vision tower and the decoder up to the last of these attentions
run: once query and key of that layer are known, the forward is stopped. Of FastV's layer K − 1
itself the attention kernel, the output projection and the MLP do not run; nor do the layers from K
on, the final norm and the language model head.

Attention is summed in whole multiples of 2⁻⁶², its squares in multiples of 2⁻¹²⁴, by integers of
any size. So the sums depend on what the model computes of each sample and on nothing else: not on
order, shards, merges or interruptions; and the variance has no cancellation. What a host reads need
not be a share: sums over heads, text tokens or layers are summed just so, as long as they are from
0 to 2³⁰.

What the model computes of a sample is the same to the last bit only in a batch of the same make-up:
in another one, kernels add in another order. Where samples fall into other batches, as with another
`batch_size`, or with shards or a `limit` that do not end with a batch, the mean moves by rounding.
Measured on the embedded model, Ā of a position moves by up to 2e-6 of its value in float32 and 7e-3
in bfloat16, and an exponential P by up to 1e-7 and 2e-3. With `batch_size=1` nothing moves.
"""

from __future__ import annotations

import datetime
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pore._compat.weights import execution_device
from pore.bias.provenance import Provenance
from pore.calibration.host import HostCalibration
from pore.calibration.sums import (
    _LARGEST,
    BadSample,
    Calibration,
    _differences,
    _digest,
    _log,
    _marks,
    _reasons,
    _split,
    _tokens,
)
from pore.data.prompts import build_inputs, processor_settings, prompt_template
from pore.errors import CalibrationError, InputError, ScoreError, StaleCheckpointError
from pore.identity import forget, identity
from pore.layout import Layout
from pore.methods.guides import Guide

if TYPE_CHECKING:
    from rich.progress import Progress

    from pore.data.samples import Sample


_EARLY = 50


_MOSTLY_BAD = 0.5


class _Reader(NamedTuple):
    """What reads the curves of a batch.

    Attributes:
        host: Name of the method that they are for.
        where: Whose attention that is, in words.
        read: Gives the images and, for every stage, (I, t) numbers.
    """

    host: str
    where: str
    read: Callable[..., tuple[Layout | Guide, tuple[Tensor, ...]]]


def _through(
    model: nn.Module,
    processor: Any,
    samples: Iterable[Sample],
    *,
    reader: _Reader,
    stages: Sequence[Mapping[str, Any]],
    batch_size: int,
    checkpoint: str | os.PathLike[str] | None,
    every: int,
    max_bad: float,
    progress: bool,
    limit: int | None,
    source: str | None,
    settings: str = "",
) -> HostCalibration:
    """One pass over the samples; `stages` says in provenance what is read, `settings` how."""
    _check_arguments(batch_size, every, max_bad, limit)
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]
    forget(model)  # a pass over the data is worth a pass over the weights
    origin = Provenance(
        **identity(model),
        host=reader.host,
        processor=processor_settings(processor),
        template=prompt_template(processor),
        date=datetime.date.today().isoformat(),
        source=source,
    )
    state = start = HostCalibration(
        tuple(
            Calibration(
                provenance=replace(origin, **stage),
                dtype=str(dtype).removeprefix("torch."),
                passes=(settings,),
                samples=b"",
            )
            for stage in stages
        )
    )
    known = [n for n in (operator.length_hint(samples, -1), limit) if n is not None and n >= 0]
    total = min(known, default=None)
    stream = islice(samples, limit)
    marks = partial(_marks, _tokens(processor))
    if checkpoint is not None and Path(checkpoint).exists():
        state = _resume(checkpoint, start, stream, marks)
    saved = state.seen
    device = _device(model)

    def keep() -> None:
        nonlocal saved
        if checkpoint is not None and state.seen > saved:
            state.save(checkpoint)
            saved = state.seen

    try:
        with _evaluation(model), _bar(progress, total, state) as bar:
            while batch := list(islice(stream, batch_size)):
                measured, bad = _measure(model, processor, batch, reader, device, dtype)
                if not (measured or state.count) and any(b.reason == _NOT_FINITE for b in bad):
                    raise ScoreError(
                        f"Attention of {reader.where} is NaN or infinite from the start; look for "
                        "overflow (fp16 where the model needs bf16?), damaged weights or bad "
                        "inputs."
                    )
                for one in bad:
                    _log.warning("Skipped the sample %s: %s", one.id, one.reason)
                state = state._including(batch, marks(batch), measured, bad)
                _check_bad(state, max_bad, total)
                bar.update(bar.task_ids[0], completed=state.seen, bad=len(state.bad))
                if state.seen - saved >= every:
                    keep()
    except KeyboardInterrupt:
        keep()
        where = (
            "nothing was kept; give a checkpoint to be able to go on"
            if checkpoint is None
            else f"their sums are in {os.fspath(checkpoint)}: make the same call again to go on"
        )
        message = f"Calibration was interrupted after {state.seen} samples; {where}."
        raise KeyboardInterrupt(message) from None
    except BaseException:
        keep()
        raise
    keep()
    if state.seen == 0:
        raise CalibrationError("There is no sample to calibrate on.")
    state.stages[0]._counted()
    _check_bad(state, max_bad, state.seen)
    return state


_NOT_FINITE = "its attention is NaN or infinite"


def _measure(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    reader: _Reader,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[list[tuple[Layout | Guide, np.ndarray]], list[BadSample]]:
    """Attention (S, I, t) of the good samples by batch, and the bad ones, which spoil no other."""
    good, bad = [], []
    for sample in samples:
        try:
            good.append(replace(sample, image=sample.load_image()))
        except InputError as error:
            bad.append(BadSample(sample.id, str(error)))
    if not good:
        return [], bad
    try:
        inputs = build_inputs(processor, good, device, dtype)
        layout, attention = reader.read(model, inputs)
    except InputError as error:
        if len(good) == 1:
            return [], [*bad, BadSample(good[0].id, str(error))]
        measured = []
        for sample in good:
            one, refused = _measure(model, processor, [sample], reader, device, dtype)
            measured += one
            bad += refused
        return measured, bad
    if not bool(layout.valid.all()):
        raise CalibrationError(
            f"The images of {', '.join(sample.id for sample in good)} have different numbers of "
            "visual tokens. A position bias is of one grid: calibrate with images of one size."
        )
    if any(curve.shape != layout.valid.shape for curve in attention):
        raise CalibrationError(
            f"The stages of {reader.host} read {[tuple(curve.shape) for curve in attention]} of "
            f"visual tokens of shape {tuple(layout.valid.shape)}; the reader, or the stage's "
            "curve, must give one number for every token."
        )
    rows = np.stack([curve.to("cpu", torch.float64).numpy() for curve in attention])
    finite = np.isfinite(rows).all(axis=(0, 2))
    if (rows[:, finite] < 0).any() or (rows[:, finite] > _LARGEST).any():
        raise CalibrationError(
            f"What {reader.host} reads is no attention: it runs from {rows[:, finite].min():g} to "
            f"{rows[:, finite].max():g}, where 0 to 2^30 can be."
        )
    spoiled = {image.row for image, fine in zip(layout.images, finite, strict=True) if not fine}
    bad += [BadSample(good[row].id, _NOT_FINITE) for row in sorted(spoiled)]
    keep = [image.row not in spoiled for image in layout.images]
    return ([(layout, rows[:, keep])] if any(keep) else []), bad


def _check_arguments(batch_size: int, every: int, max_bad: float, limit: int | None) -> None:
    for name, value in (("batch_size", batch_size), ("every", every), ("limit", limit)):
        if value is not None and (type(value) is not int or value < 1):
            raise CalibrationError(f"{name} must be a whole number of at least 1, not {value!r}.")
    if not 0 <= max_bad <= 1:
        raise CalibrationError(f"max_bad is a share from 0 to 1, not {max_bad!r}.")


def _check_bad(state: HostCalibration, max_bad: float, total: int | None) -> None:
    """Fail when too many samples are bad, or will be whatever follows."""
    bad = len(state.bad)
    hopeless = total is not None and bad > max_bad * total
    mostly = state.seen >= _EARLY and bad > max(max_bad, _MOSTLY_BAD) * state.seen
    if hopeless or mostly:
        raise CalibrationError(
            f"{bad} of {state.seen} samples are bad, more than the share max_bad={max_bad:g} "
            "allows; mend the data, or raise max_bad." + _reasons(state.bad, "They are")
        )


def _resume(
    checkpoint: str | os.PathLike[str],
    start: HostCalibration,
    stream: Iterator[Sample],
    marks: Callable[[Sequence[Sample]], bytes],
) -> HostCalibration:
    """The state in a checkpoint, if it is of this call; `stream` then stands at what is left."""
    name = os.fspath(checkpoint)
    away = f"Give another checkpoint, or delete {name} to begin anew."
    try:
        state = HostCalibration.load(checkpoint)
    except CalibrationError as error:
        raise CalibrationError(f"{error} {away}") from error
    differences = []
    if len(start.stages) != len(state.stages):
        differences = [f"there are {len(start.stages)} stages here and {len(state.stages)} there"]
    for one, other in zip(start.stages, state.stages, strict=False):
        differences += [each for each in _differences(one, other) if each not in differences]
    if differences:
        raise StaleCheckpointError(
            f"The checkpoint {name} was made under other conditions than this call has: "
            + "; ".join(differences)
            + f". {away}"
        )
    done = list(islice(stream, state.seen))
    first = state.stages[0]
    if first.passes != (_digest(start.stages[0].passes[0], done),):
        raise StaleCheckpointError(
            f"The checkpoint {name} has gone through {state.seen} samples that are not the first "
            "ones of this call (fewer, others, in another order, or with answers of another "
            f"length). {away}"
        )
    if first.samples is not None and (here := marks(done)) != first.samples:
        pairs = zip(done, _split(here), _split(first.samples), strict=True)
        ids = [sample.id for sample, mark, before in pairs if mark != before]
        raise StaleCheckpointError(
            f"The checkpoint {name} has gone through samples of the same ids and questions, but "
            f"{len(ids)} of them have another picture now, or other tokens: {', '.join(ids[:3])}"
            f"{', ...' if len(ids) > 3 else ''}. {away}"
        )
    _log.info("Going on after %d samples, from %s", state.seen, name)
    return state


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards every module in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _device(model: nn.Module) -> torch.device:
    """Where the model takes its inputs."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    device: torch.device = embeddings.weight.device
    if device.type == "meta":  # offloaded by accelerate, which knows where it will compute
        device = execution_device(embeddings)
    return device


def _bar(progress: bool, total: int | None, state: HostCalibration) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    from pore._text import Screen

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.1f} samples/s")

    console = Screen(stderr=True)
    bar = Progress(
        TextColumn("Calibrating"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[bad]} bad", markup=False),
        console=console,
        disable=not (progress and console.is_terminal),
    )
    bar.add_task("", total=total, completed=state.seen, bad=len(state.bad))
    return bar
