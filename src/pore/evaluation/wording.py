"""How pages speak of scores: as answers that are right or wrong, or as scores from 0 to 1."""

from __future__ import annotations

from typing import NamedTuple

from pore._numbers import percent
from pore.evaluation.metrics import METRICS
from pore.evaluation.records import Record


def score(record: Record) -> str:
    """What a setting scored, such as "answers 71.2 % of 700 questions right".

    Args:
        record: Its record, scored by a metric of `METRICS`.
    """
    found, metric = percent(record["accuracy"]), METRICS[record["metric"]]
    if metric.graded:
        return f"scores {found} % on {record['n']} questions ({metric.title})"
    return f"answers {found} % of {record['n']} questions right"


def mean(metric: str) -> str:
    """What the mean of the scores is, to be followed by a method: "right answers of"."""
    return f"{METRICS[metric].title} of" if METRICS[metric].graded else "right answers of"


class Scoring(NamedTuple):
    """What a page says of its scores, which the metric decides.

    Attributes:
        rule: How an answer is scored, as a sentence.
        interval: The interval of a mean score, in words.
        test: The test of a difference, in words.
    """

    rule: str
    interval: str
    test: str


def scoring(metric: str) -> Scoring:
    """What a page says of scores by a metric of `METRICS`."""
    rule = METRICS[metric].rule
    if not METRICS[metric].graded:
        return Scoring(rule, "the 95 % Wilson interval", "the exact McNemar test")
    return Scoring(
        rule,
        "the 95 % interval (Wilson's where every score is 0 or 1, otherwise from a bootstrap over "
        "the questions)",
        "the exact McNemar test where every score is 0 or 1, otherwise a test that swaps the two "
        "scores of a question at random",
    )
