"""Rules by which an answer is scored: exactly, by VQA accuracy, within 5 %, by edits, by letter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

from pore.data.samples import Sample
from pore.errors import InputError
from pore.evaluation.answers import is_right, normalise
from pore.evaluation.boxes import OVERLAP, box_in, overlap
from pore.evaluation.vqa import LEAST, vqa_accuracy

_TOLERANCE = Decimal("0.05")

_LEAST_SIMILAR = 0.5

_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:,;!)]*")
_FIRST = re.compile(r"\(?([A-Z])(?:\)|[.:,])\s")
_NAMED = re.compile(r"(?:answer|option|choice)(?: is)?:?\s*\(?([A-Z])\b", re.IGNORECASE)


@dataclass(frozen=True)
class Metric:
    """A rule by which answers are scored.

    Attributes:
        name: What `--metric` calls it.
        title: What tables call its mean.
        rule: How an answer is scored, as a sentence for pages.
        score: The score of an answer, from 0 to 1, given all that are accepted.
        graded: Whether there are scores between 0 and 1.
        unfit: Why some accepted answers cannot be compared with; None if they can.
    """

    name: str
    title: str
    rule: str
    score: Callable[[str, Sequence[str]], float]
    graded: bool = False
    unfit: Callable[[Sequence[str]], str | None] = lambda accepted: None

    def fault(self, sample: Sample) -> str | None:
        """Why answers to a sample cannot be scored; None if they can.

        Args:
            sample: The sample.
        """
        if sample.answer is None:
            if sample.box is not None:
                return None
            return f"Sample {sample.id!r} has no answer to compare with."
        why = self.unfit(sample.accepted)
        return None if why is None else f"Sample {sample.id!r} {why}"


def relaxed(given: str, accepted: Sequence[str]) -> float:
    """Relaxed accuracy, as of ChartQA (Masry et al., arXiv 2203.10244).

    A number is right if it differs from an accepted one by at most 5 % of that; 50% is 0.5. Any
    other answer is right if it is one of the accepted ones, as in `exact`.

    Args:
        given: The answer.
        accepted: The answers that are accepted.

    Returns:
        1 or 0.
    """
    number = _number(given)
    for one in accepted:
        target = _number(one)
        if number is not None and target is not None:
            if abs(number - target) <= _TOLERANCE * abs(target):
                return 1.0
        elif is_right(given, one):
            return 1.0
    return 0.0


def exact(given: str, accepted: Sequence[str]) -> float:
    """1 if the answer is one of the accepted ones after `answers.normalise`, and otherwise 0."""
    return float(any(is_right(given, one) for one in accepted))


def similarity(given: str, accepted: Sequence[str]) -> float:
    """ANLS, as of DocVQA and ST-VQA (Biten et al., arXiv 1907.00490).

    1 minus the edit distance to an accepted answer over the length of the longer one, in lower case
    and with single spaces; of the nearest accepted answer; and 0 where that is below 0.5.

    Args:
        given: The answer.
        accepted: The answers that are accepted.

    Returns:
        The score, from 0 to 1.
    """
    best = max(map(_similar, [given] * len(accepted), accepted), default=0.0)
    return best if best >= _LEAST_SIMILAR else 0.0


def choice(given: str, accepted: Sequence[str]) -> float:
    """Whether an answer names the letter of the right option.

    The letter stands alone ("B", "(b)"), begins the answer ("B. a dog"), or is named ("The answer
    is B"), as LLaVA's scorer of ScienceQA reads it.

    Args:
        given: The answer.
        accepted: The letters that are accepted.

    Returns:
        1 or 0.
    """
    found = letter_in(given)
    return float(found is not None and any(letter_in(one) == found for one in accepted))


def letter_in(text: str) -> str | None:
    """The option that an answer names, as a capital letter; None if it names none.

    Args:
        text: The answer.
    """
    text = text.strip()
    found = _LETTER.fullmatch(text) or _FIRST.match(f"{text} ") or _NAMED.search(text)
    return None if found is None else found[1].upper()


def _few(accepted: Sequence[str]) -> str | None:
    if len(accepted) >= LEAST:
        return None
    return (
        f"has {len(accepted)} answer{'s' if len(accepted) > 1 else ''}, and VQA accuracy compares "
        f"with those of ten people, at least {LEAST}; take another metric."
    )


def _no_letter(accepted: Sequence[str]) -> str | None:
    if any(letter_in(one) is not None for one in accepted):
        return None
    return f"has the answer {accepted[0]!r:.60}, which is not the letter of an option, such as B."


METRICS: Mapping[str, Metric] = {
    one.name: one
    for one in (
        Metric(
            "exact",
            "accuracy",
            "An answer is right if it equals an expected one, apart from case, outer punctuation "
            "and white space; a box is right if it overlaps the expected one by half.",
            exact,
        ),
        Metric(
            "vqa",
            "VQA accuracy",
            "An answer's score is its VQA accuracy: three of ten people who gave the same answer "
            "are enough for the full score, and fewer give a part of it.",
            vqa_accuracy,
            graded=True,
            unfit=_few,
        ),
        Metric(
            "relaxed",
            "relaxed accuracy",
            "A number is right if it is at most 5 % off an expected one, any other answer if it "
            "equals one (ChartQA's relaxed accuracy).",
            relaxed,
        ),
        Metric(
            "anls",
            "ANLS",
            "An answer's score is its likeness to the nearest expected one, letter by letter, and "
            "0 where that is below a half (ANLS, as of DocVQA).",
            similarity,
            graded=True,
        ),
        Metric(
            "choice",
            "accuracy of letters",
            "An answer is right if it names the letter of the right option.",
            choice,
            unfit=_no_letter,
        ),
    )
}
"""The metrics by name."""

EXACT = METRICS["exact"]


def metric_named(name: str) -> Metric:
    """A metric by its name.

    Args:
        name: A name of `METRICS`.

    Raises:
        InputError: There is no such metric; the message lists those that there are.
    """
    if name not in METRICS:
        raise InputError(f"There is no metric {name!r}; choose from {', '.join(METRICS)}.")
    return METRICS[name]


class Judged(NamedTuple):
    """What is thought of an answer.

    Attributes:
        right: Whether it has the full score; a box, whether it overlaps the right one by half.
        iou: How far its box overlaps the right one; None where the answer is a text.
        score: The score, where that is neither 0 nor 1.
    """

    right: bool
    iou: float | None
    score: float | None


def judged(sample: Sample, text: str, metric: Metric = EXACT) -> Judged:
    """What is thought of an answer: a text by the metric, a box by its overlap with the right one.

    Args:
        sample: What was asked, with an answer or else a box.
        text: What the model wrote.
        metric: The rule for texts.
    """
    if sample.answer is None and sample.box is not None:
        given = box_in(text)
        found = 0.0 if given is None else overlap(given, sample.box)
        return Judged(found >= OVERLAP, found, None)
    score = metric.score(text, sample.accepted)
    return Judged(score == 1, None, None if score in (0, 1) else score)


def _number(text: str) -> Decimal | None:
    """The number that an answer is; a percentage is a share."""
    plain = normalise(text)
    try:
        value = Decimal(plain.removesuffix("%"))
    except InvalidOperation:
        return None
    if not value.is_finite():
        return None
    return value / 100 if plain.endswith("%") else value


def _similar(one: str, other: str) -> float:
    one, other = (" ".join(text.lower().split()) for text in (one, other))
    longer = max(len(one), len(other))
    return 1 - _edits(one, other) / longer if longer else 1.0


def _edits(one: str, other: str) -> int:
    """Letters to insert, delete or replace to make one text the other (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, wanted in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != wanted))
    return row[-1]
