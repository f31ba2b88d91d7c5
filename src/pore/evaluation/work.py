"""The progress of a job that has many parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pore.data.samples import Sample
from pore.engine.pruner import Pruner

Progress = Callable[[int], None]
"""Called after every batch with the number of samples in it."""

Told = Callable[[str, float], None]
"""Called with what is being done, and the share of the work done so far."""


def cost(pruner: Pruner | None, visual: int, layers: int) -> float:
    """The rough cost of a question relative to the unpruned model, for progress bars only.

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
    """The progress of a job that has many parts, as a share of its whole work.

    Args:
        total: The whole work, in any unit.
        told: Called with what is being done, and the share of the work done so far.
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
        """A function to call with the number of further things done, each of this cost."""

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
