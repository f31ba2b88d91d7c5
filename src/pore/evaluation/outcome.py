"""The answers of a model under one setting, and how two settings compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

from pore.engine.pruner import Pruner
from pore.errors import InputError
from pore.evaluation.batches import Skipped, listed
from pore.evaluation.guided import guiding_of
from pore.evaluation.statistics import Paired, paired, wilson
from pore.plotting.labels import UNPRUNED, budget_label, label, points
from pore.tower.stages import TowerStage


@dataclass(frozen=True)
class Answer:
    """One question and its answer.

    Attributes:
        id: The sample's.
        question: What was asked.
        expected: The right answer.
        given: What the model wrote.
        right: Whether `given` equals `expected`, after `answers.normalise`.
        kind: Kind of the question, if the sample names one.
        third: Third of the image asked about, if the sample names one.
        kept: For each image, raster indices of the visual tokens that reached the last layer.
        flops: FLOPs of the prefill (true count), or None if the model's sizes are not known.
        extra: Visual tokens that reached the last layer and stand for no single patch.
        mean_tokens: Visual tokens of the prompt, averaged over the decoder layers.
    """

    id: str
    question: str
    expected: str
    given: str
    right: bool
    kind: str | None
    third: str | None
    kept: tuple[tuple[int, ...], ...]
    flops: int | None
    extra: int = 0
    mean_tokens: float | None = None


@dataclass(frozen=True)
class Outcome:
    """The answers of one model under one setting.

    Attributes:
        pruner: The method and its settings; None for the unpruned model.
        answers: One per question that was asked, in the order of the samples.
        prefill_ms: Median time of the prefill per question, if it was measured.
        budget: The budget under which it is listed, if not the method's own `keep`; in words if it
            is not a number of tokens left at the end.
        skipped: The samples that could not be asked, in their order.
        asked: Which model answered: the names `model` and `revision`, and the fingerprint of its
            `weights`; unknown ones are left out.
    """

    pruner: Pruner | None
    answers: tuple[Answer, ...]
    prefill_ms: float | None = None
    budget: int | float | str | None = None
    skipped: tuple[Skipped, ...] = ()
    asked: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """Name of the method."""
        return UNPRUNED if self.pruner is None else self.pruner.name

    @property
    def keep(self) -> int | float | str | None:
        """The budget: tokens per image, or the fraction kept; 1.0 for the unpruned model.

        In words if a method takes a budget of another kind, such as a number for every stage.
        """
        if self.budget is not None:
            return self.budget
        keep: Any = 1.0 if self.pruner is None else getattr(self.pruner, "keep", None)
        if isinstance(keep, tuple):
            return f"keep {', '.join(budget_label(one).removeprefix('keep ') for one in keep)}"
        return keep if keep is None or isinstance(keep, (int, float)) else f"keep {keep}"

    @property
    def reweight(self) -> str | None:
        """Kind of the position bias that attention is divided by, such as "exponential"."""
        bias = getattr(self.pruner, "reweight", None)
        first = bias[0] if isinstance(bias, tuple) else bias
        return None if first is None else str(first.kind)

    @property
    def acts_in(self) -> str | None:
        """Where the method first drops tokens: "tower", "embeddings" or "decoder"."""
        if self.pruner is None:
            return None
        first = self.pruner.stages()[0]
        if isinstance(first, TowerStage):
            return "tower"
        return "decoder" if first.layer else "embeddings"

    @property
    def looks_at(self) -> list[int]:
        """The decoder layers whose attention, or else whose output, the method ranks by."""
        return [] if self.pruner is None else self.pruner.looks_at

    @property
    def guide(self) -> str | None:
        """The name of the model that guides the method, if one does."""
        guiding = guiding_of(self.pruner)
        return None if guiding is None else guiding.name

    @property
    def label(self) -> str:
        """The method in words, such as "FastV + PoRe" if a measured bias is divided out."""
        return label(self.method, self.reweight)

    @property
    def right(self) -> tuple[bool, ...]:
        """Right or wrong, one per question."""
        return tuple(answer.right for answer in self.answers)

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.right) / len(self.answers)

    @property
    def ci(self) -> tuple[float, float]:
        """Wilson interval of the accuracy, at 95 %."""
        return wilson(sum(self.right), len(self.answers))

    @property
    def tokens_after(self) -> float:
        """Visual tokens of a prompt that reach the last layer, on average."""
        kept = sum(len(image) for answer in self.answers for image in answer.kept)
        return (kept + sum(answer.extra for answer in self.answers)) / len(self.answers)

    @property
    def mean_tokens(self) -> float | None:
        """Visual tokens of a prompt averaged over the decoder layers, on average; None: unknown."""
        known = [a.mean_tokens for a in self.answers if a.mean_tokens is not None]
        return sum(known) / len(known) if len(known) == len(self.answers) else None

    @property
    def flops(self) -> float | None:
        """Mean FLOPs of a prefill (true count), or None if the model's sizes are not known."""
        known = [answer.flops for answer in self.answers if answer.flops is not None]
        return sum(known) / len(known) if len(known) == len(self.answers) else None

    def accuracy_by(self, key: Callable[[Answer], str | None]) -> dict[str, float]:
        """Accuracy of every group of questions, in order of first appearance.

        Args:
            key: The group of a question, or None to leave it out.

        Returns:
            Accuracy by group.
        """
        groups: dict[str, list[bool]] = {}
        for answer in self.answers:
            group = key(answer)
            if group is not None:
                groups.setdefault(group, []).append(answer.right)
        return {group: sum(right) / len(right) for group, right in groups.items()}

    def record(self) -> dict[str, Any]:
        """The outcome as one record of `results.json`."""
        return {
            "method": self.method,
            "reweight": self.reweight,
            "keep": self.keep,
            "layer": getattr(self.pruner, "layer", None),
            "accuracy": self.accuracy,
            "ci": list(self.ci),
            "accuracy_by_kind": self.accuracy_by(lambda answer: answer.kind),
            "accuracy_by_third": self.accuracy_by(lambda answer: answer.third),
            "n": len(self.answers),
            "skipped": [{"id": one.id, "reason": one.reason} for one in self.skipped],
            "tokens_after": self.tokens_after,
            "mean_tokens": self.mean_tokens,
            "acts_in": self.acts_in,
            "looks_at": self.looks_at,
            "guide": self.guide,
            "flops": self.flops,
            "prefill_ms": self.prefill_ms,
            **{name: self.asked.get(name) for name in ("model", "revision", "weights")},
        }


def common(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Restrict outcomes to the same questions: those that none of them had to skip.

    Args:
        outcomes: Outcomes of the same samples.

    Returns:
        The outcomes, in their order.

    Raises:
        InputError: No question is left.
    """
    skipped = {one.number: one for outcome in outcomes for one in outcome.skipped}
    together = tuple(skipped[number] for number in sorted(skipped))
    over_the_same = []
    for outcome in outcomes:
        own = {one.number for one in outcome.skipped}
        numbers = (i for i in range(len(outcome.answers) + len(own)) if i not in own)
        pairs = zip(numbers, outcome.answers, strict=True)
        answers = tuple(answer for number, answer in pairs if number not in skipped)
        if outcome.answers and not answers:
            raise InputError(f"No question was asked by every method.{listed(together)}")
        over_the_same.append(replace(outcome, answers=answers, skipped=together))
    return over_the_same


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
            f"{points(paired.difference)} points {self.interval}, p = {paired.p:.2g}"
        )

    @property
    def interval(self) -> str:
        """The 95 % interval in percentage points."""
        return f"[{points(self.paired.ci[0])}, {points(self.paired.ci[1])}]"

    def record(self) -> dict[str, Any]:
        """The difference as one record of `differences.json`."""
        paired = self.paired
        return {
            "keep": self.second.keep,
            "method": self.second.method,
            "reweight": self.second.reweight,
            "against": self.first.label,
            "third": self.third,
            "looks_at": self.second.looks_at,
            "guide": self.second.guide,
            "difference": paired.difference,
            "ci": list(paired.ci),
            "won": paired.gained,
            "lost": paired.lost,
            "p_mcnemar": paired.p,
            "n": paired.n,
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
    if _asked(first.answers) != _asked(second.answers):
        raise InputError("Two outcomes can be compared only if they answer the same questions.")
    chosen = [third in (None, answer.third) for answer in first.answers]
    rights = (list(compress(outcome.right, chosen)) for outcome in (first, second))
    return Difference(first, second, paired(*rights, seed=seed), third)


def _asked(answers: Sequence[Answer]) -> list[tuple[str, str]]:
    return [(answer.id, answer.question) for answer in answers]
