"""Which differences between two files of results are real."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import pore
from pore.errors import InputError
from pore.evaluation.batches import Skipped
from pore.evaluation.files import Results
from pore.evaluation.outcome import Answer, Outcome, questions_of, records_of
from pore.evaluation.statistics import holm, paired
from pore.evaluation.verdicts import judge, name_of

N = 60


def outcome(pruner: Any, right: int, *, shift: int = 0, weights: str = "w") -> Outcome:
    """Answers to `N` questions, of which the first `right` are right."""
    answers = tuple(
        Answer(str(i), "q", "x", "x", (i - shift) % N < right, None, None, ((0,),), 1)
        for i in range(N)
    )
    return Outcome(pruner, answers, asked={"weights": weights})


def results(*outcomes: Outcome) -> Results:
    return Results({}, questions_of(outcomes), records_of(outcomes))


BEFORE = results(
    outcome(None, 55), outcome(pore.FastV(keep=4), 30), outcome(pore.FastV(keep=2), 20)
)
AFTER = results(
    outcome(None, 55), outcome(pore.FastV(keep=4), 45), outcome(pore.FastV(keep=2), 24, shift=1)
)


def test_methods_of_one_name_are_compared_at_every_budget() -> None:
    found = judge(BEFORE, AFTER)
    assert [(one.first["keep"], one.second["method"]) for one in found] == [
        (4, "FastV"),
        (2, "FastV"),
    ]
    for one in found:
        scores = (one.first["scores"], one.second["scores"])
        assert one.paired == paired(*scores)
    assert [one.p_holm for one in found] == holm([one.paired.p for one in found])
    assert [one.real for one in found] == [True, False]
    assert found[0].record()["difference"] == pytest.approx(15 / 60)
    assert [one.p_holm for one in judge(BEFORE, BEFORE_AGAIN)] == [1.0, 1.0]


BEFORE_AGAIN = replace(BEFORE, records=[dict(record) for record in BEFORE.records])


def test_the_unpruned_model_counts_only_where_the_weights_differ() -> None:
    other = results(outcome(None, 40, weights="v"), outcome(pore.FastV(keep=4), 45))
    assert [one.second["method"] for one in judge(BEFORE, other)] == ["unpruned", "FastV"]


def test_a_method_of_each_file_by_name() -> None:
    bias = pore.PositionBias.exponential(0.1, 16)
    both = results(
        outcome(pore.FastV(keep=4), 30), outcome(pore.FastV(keep=4, reweight=bias), 45),
        outcome(pore.Random(keep=4), 25),
    )  # fmt: skip
    for name in ("FastV + PoRe", "fastv + exponential"):
        (found,) = judge(both, both, names=("FastV", name))
        assert (name_of(found.first), name_of(found.second)) == ("FastV", "FastV + exponential")
    found_all = judge(both, both, names=("fastv", None))
    assert [name_of(one.second) for one in found_all] == ["FastV + exponential", "Random"]
    with pytest.raises(InputError, match=r"'x' to compare.*has FastV \(keep 4\), FastV \+ exp"):
        judge(both, both, names=("x", None))
    with pytest.raises(InputError, match="no settings to compare"):
        judge(both, results(outcome(pore.FastV(keep=3), 4)))


def test_questions_are_found_by_their_ids() -> None:
    """Another order is the same questions, and one that a file skipped is left out."""
    one, other = outcome(pore.FastV(keep=4), 30), outcome(pore.FastV(keep=4), 45)
    turned = replace(other, answers=other.answers[::-1])
    (found,) = judge(results(one), results(turned))
    assert found.paired.difference == pytest.approx(15 / 60)
    skipped = replace(
        other, answers=other.answers[:-1], skipped=(Skipped(N - 1, str(N - 1), "no picture"),)
    )
    (found,) = judge(results(one), results(skipped))
    assert found.paired.n == N - 1


def test_other_questions_are_refused() -> None:
    one = outcome(pore.FastV(keep=4), 30)
    fewer = replace(one, answers=one.answers[:-2])
    with pytest.raises(InputError, match="other questions: 2 of 60 are in one of them alone"):
        judge(results(one), results(fewer))
    reworded = replace(one, answers=(replace(one.answers[0], expected="y"), *one.answers[1:]))
    with pytest.raises(InputError, match="0 has another question or another right answer"):
        judge(results(one), results(reworded))
    with pytest.raises(InputError, match="File 2 does not say which questions"):
        judge(results(one), Results({}, (), [{**results(one).records[0], "scores": None}]))
