"""A pass over samples whose batches actors of Ray measure, on one machine or a cluster.

Each actor loads the model once. Batches are those of a single process and their sums are put
together in their order, so that the result is that of a single process. An actor whose process ends
is started again by Ray, and measures again what it had not finished.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from pore.calibration.batch import BadSample
from pore.calibration.host import HostCalibration
from pore.calibration.measuring import Subject
from pore.calibration.reading import Reader
from pore.calibration.rounds import measured
from pore.calibration.seen import digest, marks_of, tokens_of
from pore.data.samples import Sample
from pore.errors import CalibrationError, InputError
from pore.identity import identity

_AHEAD = 2  # batches that are given to every actor, so that none waits for the next


@dataclass(frozen=True)
class Actors:
    """Actors of Ray that measure samples.

    Attributes:
        load: Returns the model and its processor, in the process of an actor.
        count: How many actors; None for one for every GPU of the cluster, or a single one.
    """

    load: Callable[[], tuple[Any, Any]]
    count: int | None = None


def connected() -> Any:
    """Ray, connected to the cluster that `RAY_ADDRESS` names, or to one of this machine.

    Raises:
        InputError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("Actors need Ray: pip install 'pore-vlm[ray]'.") from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False)
    return ray


class ActorRounds:
    """Goes through samples, batch by batch, as `Rounds` does.

    Attributes:
        over: Whether the samples are used up.
    """

    def __init__(
        self, actors: Actors, reader: Reader, start: HostCalibration, batch_size: int
    ) -> None:
        """Start the actors.

        Args:
            actors: How many, and what they load.
            reader: What reads the model.
            start: The state before the first sample of all.
            batch_size: Samples in a batch.

        Raises:
            InputError: Ray is not installed.
        """
        ray = connected()
        gpus = int(ray.cluster_resources().get("GPU", 0))
        # No CPU of theirs in Ray's count: with all of them taken, Ray Data could not read.
        kind = ray.remote(
            num_gpus=1 if gpus else 0,
            num_cpus=0,
            scheduling_strategy="SPREAD",
            max_restarts=-1,
            max_task_retries=-1,
        )(_Actor)
        count = actors.count or max(gpus, 1)
        self._actors = [kind.remote(actors.load, reader, start) for _ in range(count)]
        self._ray, self._batch_size = ray, batch_size
        self._given: deque[tuple[Any, Sequence[Sample]]] = deque()
        self._number = 0
        self.over = False

    def following(
        self, state: HostCalibration, stream: Iterator[Sample], tell: Callable[[float], None]
    ) -> HostCalibration:
        """The state after one more batch; see `Rounds.following`."""
        while len(self._given) < _AHEAD * len(self._actors):
            batch = list(islice(stream, self._batch_size))
            if not batch:
                break
            actor = self._actors[self._number % len(self._actors)]
            first = self._number == 0 and not state.count
            self._given.append((actor.measure.remote(batch, first), batch))
            self._number += 1
        if not self._given:
            self.over = True
            return state
        result, samples = self._given.popleft()
        try:
            sums, marks, bad = self._ray.get(result)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.ActorDiedError as error:  # it could not even load its model
            raise CalibrationError(f"The actors of Ray cannot measure: {error}") from error
        tell(state.seen + len(samples))
        return state.followed_by([sums], marks, bad, digest(state.stages[0].passes[0], samples))


class _Actor:
    """Measures batches in a process of its own."""

    def __init__(
        self, load: Callable[[], tuple[Any, Any]], reader: Reader, start: HostCalibration
    ) -> None:
        model, processor = load()
        dtype, weights = str(model.dtype).removeprefix("torch."), identity(model)["weights"]
        there = start.stages[0]
        if (dtype, weights) != (there.dtype, there.provenance.weights):
            raise CalibrationError(
                f"An actor loaded another model ({dtype}) than the process that started it "
                f"({there.dtype}). Name the number format, with --dtype, and give all machines the "
                "same checkpoint."
            )
        model.eval()
        self._subject = Subject.of(model, processor, reader)
        self._marks = partial(marks_of, tokens_of(processor))
        self._start = start

    def measure(
        self, samples: Sequence[Sample], first: bool
    ) -> tuple[HostCalibration, bytes, Sequence[BadSample]]:
        """The sums over a batch, the marks of its samples and those that are bad."""
        batch = measured(self._subject, self._marks, samples, first)
        return self._start.including(batch), batch.marks, batch.bad
