"""The mean attention Ā over a data set, to which the position bias P is fitted.

The stages of a host method read the attention that they would divide by P, in the unpruned model,
and keep everything. Only the vision tower and the decoder up to the last of these attentions run:
once query and key of that layer are known, the forward is stopped. So in FastV's layer K − 1 the
attention kernel, the output projection and the MLP do not run; nor do the layers from K on, the
final norm and the language model head.

Attention is summed in whole multiples of 2⁻⁶², its squares in multiples of 2⁻¹²⁴, by integers of
any size. So the sums depend only on what the model computes for each sample, not on order, shards,
merges or interruptions, and the variance has no cancellation. What a host reads need not be a
share: sums over heads, text tokens or layers work too, as long as they are from 0 to 2³⁰.

What the model computes for a sample is the same to the last bit only in batches of the same shape
and contents: otherwise kernels add in another order. If samples fall into other batches, as with
another `batch_size`, or with shards or a `limit` that do not end with a batch, rounding changes the
mean. Measured on the embedded model, Ā of a position changes by up to 2e-6 of its value in float32
and 7e-3 in bfloat16, and an exponential P by up to 1e-7 and 2e-3. With `batch_size=1` nothing
changes.
"""

from __future__ import annotations

import datetime
import logging
import operator
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, TypedDict

import torch
from torch import nn

from pore._processes import Processes, joined
from pore._progress import progress
from pore.bias.provenance import Provenance
from pore.calibration.actors import ActorRounds, Actors
from pore.calibration.batch import reasons
from pore.calibration.checkpoint import Checkpoint
from pore.calibration.host import HostCalibration
from pore.calibration.measuring import Subject
from pore.calibration.reading import Reader
from pore.calibration.rounds import Rounds, resumed
from pore.calibration.seen import marks_of, tokens_of
from pore.calibration.stability import due
from pore.calibration.sums import Calibration
from pore.calibration.table import Table
from pore.data.prompts import processor_settings, prompt_template
from pore.data.samples import Sample
from pore.errors import CalibrationError
from pore.identity import forget, identity

_log = logging.getLogger("pore.calibration")


_EARLY = 50


_MOSTLY_BAD = 0.5


Until = Callable[[HostCalibration], bool]
"""Says from the sums so far whether they are enough."""


class Options(TypedDict, total=False):
    """How to go through the samples, as keywords; see `Pass`."""

    batch_size: int
    checkpoint: str | os.PathLike[str] | None
    every: int
    max_bad: float
    progress: bool
    limit: int | None
    source: str | None
    distributed: bool
    until: Until | None
    actors: Actors | None


@dataclass(frozen=True)
class Pass:
    """How to go through the samples.

    Attributes:
        batch_size: Samples in one forward.
        checkpoint: JSON file of the state, read if it is there.
        every: Samples between two checkpoints, rounded up to whole batches.
        max_bad: The share of bad samples up to which they are skipped.
        progress: Whether to show progress if stderr is a terminal.
        limit: Use at most this many samples, from the first.
        source: The data set, for the provenance.
        distributed: Whether the processes of `torch.distributed` share the samples.
        until: Asked now and then (`pore.calibration.stability.due`) whether this is enough.
        actors: Actors of Ray that measure the samples; None to measure them here.

    Raises:
        CalibrationError: One is out of range.
    """

    batch_size: int = 8
    checkpoint: str | os.PathLike[str] | None = None
    every: int = 100
    max_bad: float = 0.01
    progress: bool = True
    limit: int | None = None
    source: str | None = None
    distributed: bool = False
    until: Until | None = None
    actors: Actors | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "every", "limit"):
            value = getattr(self, name)
            if value is None and name == "limit":
                continue
            if type(value) is not int or value < 1:
                raise CalibrationError(
                    f"{name} must be a whole number of at least 1, not {value!r}."
                )
        if self.actors is not None and self.distributed:
            raise CalibrationError("Either actors share the samples, or processes; not both.")
        if not 0 <= self.max_bad <= 1:
            raise CalibrationError(f"max_bad is a share from 0 to 1, not {self.max_bad!r}.")

    def through(
        self, model: nn.Module, processor: Any, samples: Iterable[Sample], reader: Reader
    ) -> HostCalibration:
        """Go through the samples, starting where the checkpoint ends.

        Args:
            model: The model, not pruned.
            processor: Its processor.
            samples: The samples.
            reader: What reads the model.

        Returns:
            The sums over all good images.

        Raises:
            CalibrationError: The checkpoint is not from this call, or too many samples are bad.
            ScoreError: Attention is not finite from the start.
        """
        dtype: torch.dtype = model.dtype  # type: ignore[assignment]
        processes = joined() if self.distributed else Processes()
        start = self._start(model, processor, reader, dtype)
        known = [n for n in (operator.length_hint(samples, -1), self.limit) if n is not None]
        total = min((n for n in known if n >= 0), default=None)
        stream = islice(samples, self.limit)
        marks = partial(marks_of, tokens_of(processor))
        checkpoint = Checkpoint(self.checkpoint if processes.first else None, self.every)
        state = resumed(processes, checkpoint, start, stream, marks)
        rounds: Rounds | ActorRounds
        if self.actors is not None:
            rounds = ActorRounds(self.actors, reader, start, self.batch_size)
        else:
            sizes = (self.batch_size, self.every, self.until is not None)
            subject = Subject.of(model, processor, reader)
            rounds = Rounds(processes, subject, start, marks, *sizes)
        show = self.progress and processes.first
        try:
            with _evaluation(model), progress(total, "samples", show=show) as told:
                told("calibrating", state.seen)
                while not (rounds.over or self._enough(state, processes)):
                    before = state
                    tell = partial(told, f"calibrating, {len(state.bad)} bad")
                    state = rounds.following(state, stream, tell)
                    if processes.first:
                        for one in state.bad[len(before.bad) :]:
                            _log.warning("Skipped the sample %s: %s", one.id, one.reason)
                    self._check_bad(state, total)
                    told(f"calibrating, {len(state.bad)} bad", state.seen)
                    checkpoint.keep(state, at_once=False)
        except KeyboardInterrupt:
            checkpoint.keep(state)
            message = f"Calibration was interrupted after {state.seen} samples; "
            raise KeyboardInterrupt(f"{message}{checkpoint.how_to_go_on}.") from None
        except BaseException:
            checkpoint.keep(state)
            raise
        checkpoint.keep(state)
        if state.seen == 0:
            raise CalibrationError("There is no sample to calibrate on.")
        state.stages[0].images_measured()
        self._check_bad(state, state.seen)
        return state

    def _start(
        self, model: nn.Module, processor: Any, reader: Reader, dtype: torch.dtype
    ) -> HostCalibration:
        """The state before the first sample."""
        forget(model)  # beside a pass over the data, reading the weights once more costs little
        origin = Provenance(
            **identity(model),
            host=reader.host,
            processor=processor_settings(processor),
            template=prompt_template(processor),
            date=datetime.date.today().isoformat(),
            source=self.source,
        )
        return HostCalibration(
            tuple(
                Calibration(
                    provenance=replace(origin, **stage),
                    dtype=str(dtype).removeprefix("torch."),
                    passes=(reader.settings,),
                    samples=b"",
                    table=Table(),
                )
                for stage in reader.stages
            )
        )

    def _enough(self, state: HostCalibration, processes: Processes) -> bool:
        """Whether the samples so far are enough; the first process says so."""
        until = self.until
        if until is None or not due(state.seen, self.batch_size):
            return False
        return processes.meet(lambda: processes.first and until(state))[0]

    def _check_bad(self, state: HostCalibration, total: int | None) -> None:
        """Fail if too many samples are bad, or will be even if all others are good."""
        bad = len(state.bad)
        hopeless = total is not None and bad > self.max_bad * total
        mostly = state.seen >= _EARLY and bad > max(self.max_bad, _MOSTLY_BAD) * state.seen
        if hopeless or mostly:
            raise CalibrationError(
                f"{bad} of {state.seen} samples are bad, more than the share "
                f"max_bad={self.max_bad:g} allows; mend the data, or raise max_bad."
                + reasons(state.bad, "They are")
            )


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
