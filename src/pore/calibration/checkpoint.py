"""The file from which an interrupted pass continues."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from pore.calibration.host import HostCalibration
from pore.calibration.seen import digest, one_by_one
from pore.data.samples import Sample
from pore.errors import CalibrationError, StaleCheckpointError

_log = logging.getLogger("pore.calibration")


class Checkpoint:
    """Keeps the state of a pass in a file, or nowhere.

    Args:
        path: The file, or None.
        every: Number of samples after which the file is written again.
    """

    def __init__(self, path: str | os.PathLike[str] | None, every: int) -> None:
        self._path = path
        self._every = every
        self._saved = 0

    @property
    def how_to_go_on(self) -> str:
        """What is left of an interrupted pass, in words."""
        if self._path is None:
            return "nothing was kept; give a checkpoint to be able to continue"
        return f"their sums are in {os.fspath(self._path)}: make the same call again to continue"

    def keep(self, state: HostCalibration, *, at_once: bool = True) -> None:
        """Write the state, if it has samples that the file does not have.

        Args:
            state: The state of the pass.
            at_once: Whether to write even if there are fewer than `every` new samples.
        """
        new = state.seen - self._saved
        if self._path is not None and new >= (1 if at_once else self._every):
            state.save(self._path)
            self._saved = state.seen

    def resume(
        self,
        start: HostCalibration,
        stream: Iterator[Sample],
        marks: Callable[[Sequence[Sample]], bytes],
    ) -> HostCalibration:
        """The state in the file, if there is one; its samples are taken from `stream`.

        Args:
            start: The state before the first sample of this call.
            stream: The samples of this call.
            marks: Returns the marks of samples.

        Returns:
            The state from which to continue.

        Raises:
            CalibrationError: The file is damaged, or (`StaleCheckpointError`) is not from this
                call.
        """
        if self._path is None or not Path(self._path).exists():
            return start
        name = os.fspath(self._path)
        away = f"Give another checkpoint, or delete {name} to begin again."
        try:
            state = HostCalibration.load(self._path)
        except CalibrationError as error:
            raise CalibrationError(f"{error} {away}") from error
        if differences := start.differences(state):
            raise StaleCheckpointError(
                f"The checkpoint {name} was made under other conditions than this call: "
                + "; ".join(differences)
                + f". {away}"
            )
        done = list(islice(stream, state.seen))
        first = state.stages[0]
        if first.passes != (digest(start.stages[0].passes[0], done),):
            raise StaleCheckpointError(
                f"The checkpoint {name} holds {state.seen} samples that are not the first ones of "
                "this call (there are fewer or other ones, their order differs, or answers have "
                f"another length). {away}"
            )
        if first.samples is not None and (here := marks(done)) != first.samples:
            pairs = zip(done, one_by_one(here), one_by_one(first.samples), strict=True)
            ids = [sample.id for sample, mark, before in pairs if mark != before]
            raise StaleCheckpointError(
                f"The checkpoint {name} holds samples with the same ids and questions, "
                f"but {len(ids)} of them have another picture now, or other tokens: "
                f"{', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''}. {away}"
            )
        _log.info("Continuing after %d samples, from %s", state.seen, name)
        self._saved = state.seen
        return state
