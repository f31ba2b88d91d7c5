"""How two settings differ on the same questions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from typing import Any

from pore._numbers import p_value, points
from pore.errors import InputError
from pore.evaluation.outcome import Outcome, asked, common
from pore.evaluation.statistics import Paired, paired
from pore.plotting.labels import budget_label


@dataclass(frozen=True)
class Difference:
    """Two settings compared on the same questions.

    Attributes:
        first: The setting to compare with.
        second: The setting that is compared with it.
        paired: The second minus the first.
        third: The third of the image asked about, if only these questions count.
    """

    first: Outcome
    second: Outcome
    paired: Paired
    third: str | None = None

    def __str__(self) -> str:
        paired = self.paired
        return (
            f"{budget_label(self.second.keep)}: {self.second.label} − {self.first.label} = "
            f"{points(paired.difference)} points {self.interval}, p = {p_value(paired.p)}"
        )

    @property
    def interval(self) -> str:
        """The 95 % interval in percentage points."""
        return f"[{points(self.paired.ci[0])}, {points(self.paired.ci[1])}]"

    def record(self) -> dict[str, Any]:
        """The difference as one record of `differences.json`."""
        return {
            "keep": self.second.keep,
            "method": self.second.method,
            "reweight": self.second.reweight,
            "against": self.first.label,
            "third": self.third,
            "looks_at": self.second.looks_at,
            "guide": self.second.guide,
            **self.paired.record(),
        }


def compare(
    first: Outcome, second: Outcome, *, seed: int = 0, third: str | None = None
) -> Difference:
    """Compare two settings question by question, over the questions that neither had to skip.

    Args:
        first: One outcome.
        second: Another, of the same samples.
        seed: Seed of the bootstrap.
        third: Compare only the questions about this third of the image.

    Returns:
        The difference, second minus first, with its interval and test.

    Raises:
        InputError: They have different samples, or no question is about this third.
    """
    first, second = common([first, second])
    if asked(first.answers) != asked(second.answers):
        raise InputError("Two outcomes can be compared only if they answer the same questions.")
    chosen = [third in (None, answer.third) for answer in first.answers]
    rights = (list(compress(outcome.points, chosen)) for outcome in (first, second))
    return Difference(first, second, paired(*rights, seed=seed), third)
