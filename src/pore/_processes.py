"""The processes that share a job: they deal its parts out, and meet to say what they found.

`torchrun` starts them, each with the same command. They meet in rounds. What a process brings to a
meeting is a value or the error that stopped it, so that all go on with the same values, or all stop
with the same error, which the first process tells.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from pore.errors import InputError, PoreError

_Value = TypeVar("_Value")

_PATIENCE = timedelta(days=1)  # a process may read a checkpoint for long while the others wait

_INTERRUPTED = 130


class SharedError(Exception):
    """An error that every process of a job knows; its cause is what the first one tells."""


@dataclass(frozen=True)
class Processes:
    """The processes of a job, as one of them sees them.

    Attributes:
        rank: The number of this one, from 0.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.rank == 0

    def has(self, number: int) -> bool:
        """Whether part `number` of the job, from 0, is this process's."""
        return number % self.size == self.rank

    def meet(self, action: Callable[[], _Value]) -> list[_Value]:
        """Do something in every process, then tell all what came of it.

        Args:
            action: What this process does; its value must be one that can be pickled.

        Returns:
            The values of all processes, by rank.

        Raises:
            PoreError: The action of a process raised it; that of the lowest rank.
            OSError: Likewise, or another process is gone.
        """
        if self.size == 1:
            return [action()]
        value, error = None, None
        try:
            value = action()
        except (PoreError, OSError) as raised:
            if isinstance(raised.__cause__, SharedError):
                raise
            error = raised
        told = self._exchanged((value, None if error is None else _plain(error)))
        for rank, (_, reason) in enumerate(told):
            if reason is not None:
                kind, text = reason
                where = "" if rank == 0 else f"In process {rank} of {self.size}: "
                raise kind(f"{where}{text}") from SharedError()
        return [value for value, _ in told]

    def alone(self, action: Callable[[], _Value]) -> _Value:
        """Do something in the first process alone, and tell all what came of it.

        Args:
            action: As in `meet`.

        Returns:
            Its value, in every process.

        Raises:
            PoreError: The action raised it.
            OSError: Likewise, or another process is gone.
        """
        found: Any = self.meet(lambda: action() if self.first else None)[0]
        return found  # type: ignore[no-any-return]

    def _exchanged(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, value)
        except RuntimeError as error:
            raise OSError(
                "Another process of this job is gone; see what it said. Once that is mended, the "
                "same command continues."
            ) from error
        return found


def joined() -> Processes:
    """The processes of `torch.distributed`, which the program has set up.

    Raises:
        InputError: It has not.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(
            "There are no processes to share the samples with: call "
            "torch.distributed.init_process_group() first, in a program that torchrun starts."
        )
    return Processes(dist.get_rank(), dist.get_world_size())


@contextmanager
def launched() -> Iterator[Processes]:
    """The processes that torchrun started for a command, or this one alone.

    Errors are told by the first process only; the others end quietly.

    Yields:
        The processes.

    Raises:
        PoreError: What the block raised in any process.
        OSError: Likewise.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Processes()
        return
    import torch.distributed as dist

    dist.init_process_group(_backend(), timeout=_PATIENCE)
    processes = joined()
    try:
        try:
            yield processes
        except (PoreError, OSError) as error:
            raised = error
            processes.meet(lambda: _again(raised))
    except KeyboardInterrupt:
        if processes.first:
            raise
        sys.exit(_INTERRUPTED)
    except (PoreError, OSError) as error:
        if processes.first or not isinstance(error.__cause__, SharedError):
            raise
        sys.exit(0)  # with anything else torchrun may stop the first process before it has spoken
    finally:
        dist.destroy_process_group()


def device_of(name: str) -> str:
    """The device of this process.

    Args:
        name: A device, which all processes of a machine then share, or "auto", with which each has
            an accelerator of its own.

    Returns:
        The name of the device.

    Raises:
        InputError: The machine has fewer accelerators than processes.
    """
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    if name != "auto" or found is None or "LOCAL_RANK" not in os.environ:
        return name
    there, own = torch.accelerator.device_count(), int(os.environ["LOCAL_RANK"])
    if own >= there:
        raise InputError(
            f"Process {own} of this machine has no device of its own, as there are {there} "
            f"({found.type}); start as many processes as there are devices, or name one with "
            "--device, which all of them then share."
        )
    return f"{found.type}:{own}"


def _backend() -> str:
    """What carries messages: gloo between CPUs, NCCL between GPUs."""
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if gpus else "gloo"


def _plain(error: PoreError | OSError) -> tuple[type[PoreError | OSError], str]:
    """An error as any process can raise it again."""
    return (type(error) if isinstance(error, PoreError) else OSError), str(error)


def _again(error: BaseException) -> None:
    raise error
