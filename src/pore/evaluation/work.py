"""How far a job of many parts is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pore.data.samples import Sample
from pore.engine.pruner import Pruner

Progress = Callable[[int], None]


"""Told after every batch how many more samples are done."""


Told = Callable[[str, float], None]


"""Told what is being done and what share of all is done."""


def cost(pruner: Pruner | None, visual: int, layers: int) -> float:
    """About what a question costs, in units of the unpruned model's: for progress bars only.

    Args:
        pruner: The method, or None for the unpruned model.
        visual: Visual tokens of an image.
        layers: Decoder layers.

    Returns:
        The cost.
    """
    if pruner is None:
        return 1.0
    return 0.25 + 0.75 * sum(pruner.counts(visual, layers)) / (visual * layers)


class Work:
    """How far a job of many parts is, as a share of all its work.

    Args:
        total: All work, in any unit.
        told: Told what is being done and what share is done.
    """

    def __init__(self, total: float, told: Told | None) -> None:
        self._total = total
        self._told = told
        self._so_far = 0.0
        self._what = ""

    def start(self, what: str) -> None:
        """Say what comes now."""
        self._what = what
        self._tell()

    def done(self, each: float) -> Progress:
        """A function to be told how many more things of a cost are done."""

        def advance(count: int) -> None:
            self._so_far += count * each
            self._tell()

        return advance

    def through(self, samples: Sequence[Sample], each: float) -> Iterator[Sample]:
        """The samples, counted as they are taken."""
        advance = self.done(each)
        for sample in samples:
            yield sample
            advance(1)

    def finish(self) -> None:
        """Say that all is done."""
        self._so_far, self._what = self._total, "done"
        self._tell()

    def _tell(self) -> None:
        if self._told is not None:
            self._told(self._what, min(1.0, self._so_far / self._total))
