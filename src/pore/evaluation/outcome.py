"""The answers of a model under one setting, and how two settings compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from pore.bench.results import Spread
from pore.engine.pruner import Pruner
from pore.errors import InputError
from pore.evaluation.batches import Skipped, listed
from pore.evaluation.guided import guiding_of
from pore.evaluation.metrics import EXACT
from pore.evaluation.statistics import score_interval
from pore.methods.downsample import Downsample
from pore.plotting.labels import UNPRUNED, budget_label, label
from pore.tower.stages import TowerStage

Named = tuple[str, str | None, int | float | str | None]
"""What a setting is called in results: its method, its correction and its budget."""


@dataclass(frozen=True)
class Answer:
    """One question and its answer.

    Attributes:
        id: The sample's.
        question: What was asked.
        expected: The right answer.
        given: What the model wrote.
        right: Whether `given` has the full score; a box, whether it overlaps the right one by half.
        kind: Kind of the question, if the sample names one.
        third: Third of the image asked about, if the sample names one.
        kept: For each image, raster indices of the visual tokens that reached the last layer.
        flops: FLOPs of the prefill (true count), or None if the model's sizes are not known.
        extra: Visual tokens that reached the last layer and stand for no single patch.
        mean_tokens: Visual tokens of the prompt, averaged over the decoder layers.
        iou: Of a question whose answer is a box: how far the box given and the right one overlap,
            as the area of both over the area of either; 0 if no box was given.
        score: What the metric gives for the answer, where that is neither 0 nor 1, as VQA accuracy.
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
    iou: float | None = None
    score: float | None = None

    @property
    def points(self) -> float:
        """The score; 1 for right and 0 for wrong where there is no other."""
        return float(self.right) if self.score is None else self.score


class Group(NamedTuple):
    """How a group of questions did.

    Attributes:
        accuracy: Share of right answers, or mean score.
        ci: Its 95 % interval.
    """

    accuracy: float
    ci: list[float]

    @classmethod
    def of(cls, points: Sequence[float]) -> Group:
        """The group of answers with these scores, at least one."""
        return cls(sum(points) / len(points), list(score_interval(points)))


@dataclass(frozen=True)
class Outcome:
    """The answers of one model under one setting.

    Attributes:
        pruner: The method and its settings; None for the unpruned model.
        answers: One per question that was asked, in the order of the samples.
        prefill: Milliseconds of the prefill per question, once for every round, if measured.
        budget: The budget under which it is listed, if not the method's own `keep`; in words if it
            is not a number of tokens left at the end.
        skipped: The samples that could not be asked, in their order.
        asked: Which model answered: the names `model` and `revision`, and the fingerprint of its
            `weights`; unknown ones are left out.
        metric: The name of the rule by which answers are scored, as in `metrics.METRICS`; of a
            benchmark the name that it has for its own.
        circumstances: As from `circumstances.surroundings`, of when the model was asked; empty
            where that is not known.
    """

    pruner: Pruner | None
    answers: tuple[Answer, ...]
    prefill: Spread | None = None
    budget: int | float | str | None = None
    skipped: tuple[Skipped, ...] = ()
    asked: Mapping[str, str | None] = field(default_factory=dict)
    metric: str = EXACT.name
    circumstances: Mapping[str, Any] = field(default_factory=dict, compare=False)

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
    def named(self) -> Named:
        """What the setting is called in results."""
        return self.method, self.reweight, self.keep

    @property
    def right(self) -> tuple[bool, ...]:
        """Right or wrong, one per question."""
        return tuple(answer.right for answer in self.answers)

    @property
    def points(self) -> tuple[float, ...]:
        """The score of every question: 1 for right and 0 for wrong where there is no other."""
        return tuple(answer.points for answer in self.answers)

    @property
    def accuracy(self) -> float:
        """Share of right answers, or mean score."""
        return sum(self.points) / len(self.answers)

    @cached_property
    def ci(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy."""
        return score_interval(self.points)

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

    @property
    def scores(self) -> list[float | None]:
        """The score of every sample; None for those that were skipped."""
        own, given = {one.number for one in self.skipped}, iter(self.points)
        places = range(len(self.answers) + len(own))
        return [None if place in own else _short(next(given)) for place in places]

    @property
    def iou(self) -> float | None:
        """Mean overlap of boxes given and right; None if no answer is a box."""
        found = [answer.iou for answer in self.answers if answer.iou is not None]
        return sum(found) / len(found) if found else None

    def by_group(self, groups: Iterable[str | None]) -> dict[str, Group]:
        """How every group of questions did, in order of first appearance.

        Args:
            groups: The group of every answer, or None to leave it out.

        Returns:
            Accuracy and interval by group.
        """
        parts: dict[str, list[float]] = {}
        for group, points in zip(groups, self.points, strict=True):
            if group is not None:
                parts.setdefault(group, []).append(points)
        return {name: Group.of(points) for name, points in parts.items()}

    def record(self, downsampled: Outcome | None = None) -> dict[str, Any]:
        """The outcome as one record of `results.json`.

        Args:
            downsampled: The answers at the same budget of images that were only made smaller,
                which part the questions into those that it gets wrong and right.
        """
        groups = {
            "kind": self.by_group(answer.kind for answer in self.answers),
            "third": self.by_group(answer.third for answer in self.answers),
            "downsample": dict(sorted(self.by_group(_parted(self, downsampled)).items())[::-1]),
        }
        shares = {f"accuracy_by_{name}": _part(each, "accuracy") for name, each in groups.items()}
        intervals = {f"ci_by_{name}": _part(each, "ci") for name, each in groups.items()}
        spent = self.prefill
        quartiles = None if spent is None else [spent.q1, spent.q3]
        return {
            "method": self.method,
            "reweight": self.reweight,
            "keep": self.keep,
            "layer": getattr(self.pruner, "layer", None),
            "accuracy": self.accuracy,
            "ci": list(self.ci),
            "accuracy_by_kind": shares.pop("accuracy_by_kind"),
            "accuracy_by_third": shares.pop("accuracy_by_third"),
            "n": len(self.answers),
            "skipped": [{"id": one.id, "reason": one.reason} for one in self.skipped],
            "tokens_after": self.tokens_after,
            "mean_tokens": self.mean_tokens,
            "acts_in": self.acts_in,
            "looks_at": self.looks_at,
            "guide": self.guide,
            "flops": self.flops,
            "prefill_ms": None if spent is None else spent.median,
            **{name: self.asked.get(name) for name in ("model", "revision", "weights")},
            **shares,
            **intervals,
            "iou": self.iou,
            "scores": self.scores,
            "metric": self.metric,
            "prefill_ms_quartiles": quartiles,
        }


def records_of(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The records of `results.json`, with the split by Downsample where it was asked too.

    Args:
        outcomes: Outcomes of the same samples.

    Returns:
        A record for each.
    """
    smaller = {o.keep: o for o in outcomes if o.method == Downsample.name}
    return [outcome.record(smaller.get(outcome.keep)) for outcome in outcomes]


def questions_of(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What was asked, for `results.json`: one entry for every sample, in the order of the scores.

    Args:
        outcomes: Outcomes of the same samples.

    Returns:
        The sample's `id`, `asked` (a digest of question and right answer), `kind` and `third`. Of a
        sample that was skipped by all only the id is known.
    """
    unknown = {"asked": None, "kind": None, "third": None}
    found: dict[int, dict[str, Any]] = {}
    for outcome in outcomes:
        own = {one.number: one for one in outcome.skipped}
        places = (i for i in range(len(outcome.answers) + len(own)) if i not in own)
        for place, answer in zip(places, outcome.answers, strict=True):
            if found.get(place, unknown)["asked"] is None:
                asked = {"asked": _digest(answer), "kind": answer.kind, "third": answer.third}
                found[place] = {"id": answer.id, **asked}
        for number, one in own.items():
            found.setdefault(number, {"id": one.id, **unknown})
    return [found[place] for place in sorted(found)]


def _short(points: float) -> float:
    """0 and 1 as whole numbers, which files of many thousands of scores are shorter with."""
    return int(points) if points in (0, 1) else points


def _digest(answer: Answer) -> str:
    text = json.dumps([answer.question, answer.expected])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _parted(outcome: Outcome, downsampled: Outcome | None) -> list[str | None]:
    """Whether Downsample has every question right or wrong; None where that is not known."""
    answers = outcome.answers
    if downsampled is None or asked(answers) != asked(downsampled.answers):
        return [None] * len(answers)
    return ["right" if right else "wrong" for right in downsampled.right]


def _part(groups: Mapping[str, Group], name: str) -> dict[str, Any]:
    return {group: getattr(each, name) for group, each in groups.items()}


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


def asked(answers: Sequence[Answer]) -> list[tuple[str, str]]:
    """What these are answers to: ids and questions."""
    return [(answer.id, answer.question) for answer in answers]
