"""A pass over samples in rounds, whose batches several processes measure.

All processes go through the same samples in the same order, and batch i is measured by process
i mod size. So batches are those of a single process, and what the model computes for them too. At
the end of a round all processes know what every one measured; the sums are exact and add up to the
same in any order, and what has an order is put back into it. The state after a round is therefore
the state of a single process after the same samples, to the last bit, and so is its checkpoint:
any number of processes can continue from it.

A round is as long as `every` samples for each process. A process alone has rounds of one batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from pore._processes import Processes
from pore.calibration.batch import BadSample, Batch
from pore.calibration.checkpoint import Checkpoint
from pore.calibration.host import HostCalibration
from pore.calibration.measuring import NOT_FINITE, Subject, measure
from pore.calibration.seen import digest
from pore.calibration.stability import due
from pore.data.samples import Sample
from pore.errors import CalibrationError, ScoreError

Marks = Callable[[Sequence[Sample]], bytes]


class Told(NamedTuple):
    """What is known of a batch after it was measured, apart from the sums.

    Attributes:
        number: Its number in the round.
        marks: The marks of its samples.
        bad: Those that were skipped.
    """

    number: int
    marks: bytes
    bad: Sequence[BadSample]


class Share(NamedTuple):
    """What one process measured in a round.

    Attributes:
        sums: The sums over its batches.
        batches: What else is known of each.
        then: The digest of the pass after all samples of the round, of all processes.
        over: Whether there are no samples after these.
    """

    sums: HostCalibration
    batches: Sequence[Told]
    then: str
    over: bool


class Rounds:
    """Goes through samples, round by round.

    Attributes:
        over: Whether the samples are used up.
    """

    def __init__(
        self,
        processes: Processes,
        subject: Subject,
        start: HostCalibration,
        marks: Marks,
        batch_size: int,
        every: int,
        until: bool,
    ) -> None:
        """Begin before the first round.

        Args:
            processes: Those that share the samples.
            subject: What is measured.
            start: The state before the first sample of all.
            marks: Returns the marks of samples.
            batch_size: Samples in a batch.
            every: Samples of a process in a round, rounded up to whole batches.
            until: Whether a round also ends where it is asked if the samples are enough.
        """
        self.over = False
        self._processes, self._subject, self._start = processes, subject, start
        self._marks, self._batch_size = marks, batch_size
        alone = processes.size == 1
        self._until = until
        self._batches = 1 if alone else processes.size * -(-every // batch_size)

    def following(
        self, state: HostCalibration, stream: Iterator[Sample], tell: Callable[[float], None]
    ) -> HostCalibration:
        """The state after one more round.

        Args:
            state: The state before it.
            stream: The samples that follow.
            tell: Is told how many samples were gone through.

        Raises:
            CalibrationError: What is read is not attention, or the processes go through different
                samples.
            ScoreError: Attention is not finite from the start.
            PoreError: What another process raised.
        """
        shares = self._processes.meet(lambda: self._share(state, stream, tell))
        if len({share.then for share in shares}) > 1:
            raise CalibrationError(
                "The processes go through different samples. Give all of them the same data, in "
                "an order that does not change."
            )
        self.over = shares[0].over
        told = sorted(one for share in shares for one in share.batches)
        return state.followed_by(
            [share.sums for share in shares],
            b"".join(one.marks for one in told),
            [bad for one in told for bad in one.bad],
            shares[0].then,
        )

    def _share(
        self, state: HostCalibration, stream: Iterator[Sample], tell: Callable[[float], None]
    ) -> Share:
        """Go through the samples of a round and measure the batches of this process."""
        sums, found, then = self._start, [], state.stages[0].passes[0]
        gone = state.seen
        for number in range(self._batches):
            samples = list(islice(stream, self._batch_size))
            then, gone = digest(then, samples), gone + len(samples)
            if samples and self._processes.has(number):
                first = self._processes.first and not state.count + sums.count
                batch = measured(self._subject, self._marks, samples, first)
                sums = sums.including(batch)
                found.append(Told(number, batch.marks, batch.bad))
            if len(samples) < self._batch_size:
                return Share(sums, found, then, over=True)
            tell(gone)
            if self._until and due(gone, self._batch_size):
                break
        return Share(sums, found, then, over=False)


def measured(subject: Subject, marks: Marks, samples: Sequence[Sample], first: bool) -> Batch:
    """A batch that was measured.

    Args:
        subject: What is measured.
        marks: Returns the marks of samples.
        samples: The batch.
        first: Whether no image was good before, so that attention must not be NaN.

    Raises:
        CalibrationError: What is read is not attention.
        ScoreError: Attention is not finite from the start.
    """
    read, bad = measure(subject, samples)
    if first and not read and any(one.reason == NOT_FINITE for one in bad):
        raise ScoreError(
            f"Attention of {subject.reader.where} is NaN or infinite from the start; look for "
            "overflow (float16 although the model needs bfloat16?), damaged weights or bad inputs."
        )
    return Batch(samples, marks(samples), read, bad)


def resumed(
    processes: Processes,
    checkpoint: Checkpoint,
    start: HostCalibration,
    stream: Iterator[Sample],
    marks: Marks,
) -> HostCalibration:
    """The state from which all processes continue; its samples are taken from `stream`.

    Args:
        processes: The processes.
        checkpoint: The checkpoint, which the first of them reads.
        start: The state before the first sample.
        stream: The samples.
        marks: Returns the marks of samples.

    Raises:
        CalibrationError: The checkpoint is damaged or not from this call, or the processes do not
            measure the same.
    """
    found = processes.meet(lambda: (start, checkpoint.resume(start, stream, marks)))
    for rank, (other, _) in enumerate(found):
        if differences := found[0][0].differences(other):
            raise CalibrationError(
                f"Process {rank} measures under other conditions than the first: "
                + "; ".join(differences)
                + ". Give all processes the same model and settings."
            )
    state = found[0][1]
    if not processes.first:
        deque(islice(stream, state.seen), maxlen=0)
    return state
