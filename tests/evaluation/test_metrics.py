"""Metrics, against values worked out by hand from the published rules."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pore.data.samples import Sample
from pore.errors import InputError
from pore.evaluation.metrics import (
    METRICS,
    choice,
    exact,
    judged,
    metric_named,
    relaxed,
    similarity,
)
from pore.evaluation.vqa import normalise, vqa_accuracy

ANSWERS = st.text("ab 01.,'", max_size=6)


@pytest.mark.parametrize(
    ("agree", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_vqa_accuracy_of_ten_people(agree: int, score: float) -> None:
    """The values that the rule has for ten people, as VQA's page of evaluation gives it."""
    people = ["red"] * agree + [f"other {i}" for i in range(10 - agree)]
    assert vqa_accuracy("Red.", people) == pytest.approx(score)


@given(st.lists(st.sampled_from("abc"), min_size=4, max_size=10))
def test_vqa_accuracy_is_the_mean_over_subsets(people: list[str]) -> None:
    subsets = list(combinations([one == "b" for one in people], len(people) - 1))
    mean = sum(min(Fraction(sum(subset), 3), Fraction(1)) for subset in subsets) / len(subsets)
    assert vqa_accuracy("b", people) == pytest.approx(float(mean))


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The Dog", "dog"),
        ("a man on an island", "man on island"),
        ("two", "2"),
        ("None", "0"),
        ("ten o'clock", "10 o'clock"),
        ("dont", "don't"),
        ("wheres", "where's"),
        ("Don’t", "don't"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("yes.", "yes"),
        ("black/white", "black white"),
        ("hello, (world)!", "hello world"),
        ("", ""),
    ],
)
def test_the_forms_that_vqa_compares(text: str, form: str) -> None:
    assert normalise(text) == form


@given(ANSWERS)
def test_a_form_is_a_form(text: str) -> None:
    once = normalise(text)
    assert normalise(once) in (once, normalise(normalise(once)))
    assert vqa_accuracy(text, [text] * 4) == 1


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("94.9", "100", 0),
        ("-105", "-100", 1),
        ("100", "-100", 0),
        ("0", "0.0", 1),
        ("0.01", "0", 0),
        ("51%", "50%", 1),
        ("0.51", "50%", 1),
        ("51", "50%", 0),
        ("1,040", "1000", 1),
        ("Yes.", "yes", 1),
        ("100", "hundred", 0),
        ("", "0", 0),
    ],
)
def test_relaxed_accuracy(text: str, answer: str, score: float) -> None:
    """Five percent of the right number, its ends included, as in ChartQA."""
    assert relaxed(text, ["no number", answer]) == score


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("hello", "Hello ", 1),
        ("hallo", "hello", 0.8),
        ("hello  world", "hello world", 1),
        ("ab", "ac", 0.5),
        ("abc", "axy", 0),
        ("", "a", 0),
        ("kitten", "sitting", 1 - 3 / 7),
    ],
)
def test_anls(text: str, answer: str, score: float) -> None:
    assert similarity(text, [answer, "zzzzzzzzzzzzzz"]) == pytest.approx(score)


@given(ANSWERS, st.lists(ANSWERS, min_size=4, max_size=6))
def test_scores_are_shares_and_more_answers_do_no_harm(text: str, accepted: list[str]) -> None:
    for name, metric in METRICS.items():
        score = metric.score(text, accepted)
        assert 0 <= score <= 1
        if name != "vqa":  # of more people a smaller part may agree
            assert metric.score(text, accepted[:-1]) <= score
    assert (
        similarity(text, accepted) >= exact(text, accepted) - 1e-12 or text.strip() not in accepted
    )
    assert relaxed(text, accepted) >= exact(text, accepted)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("B", True),
        ("(b)", True),
        ("b.", True),
        ("B. a dog", True),
        ("(B) a dog", True),
        ("The answer is B.", True),
        ("Answer: (B)", True),
        ("A dog", False),
        ("A", False),
        ("Both", False),
        ("", False),
        ("The answer is A, not B", False),
    ],
)
def test_letters_of_options(text: str, right: bool) -> None:
    assert choice(text, ["B"]) == right
    assert choice(text, ["B. a dog"]) == right


def test_any_accepted_answer_is_right() -> None:
    sample = Sample("a", None, "q", answers=("cat", "kitten"))
    assert [judged(sample, text).right for text in ("Kitten.", "cat", "dog")] == [True, True, False]
    people = Sample("a", None, "q", answers=("cat",) * 2 + ("kitten",) * 8)
    vqa = METRICS["vqa"]
    assert judged(people, "cat", vqa) == (False, None, pytest.approx(0.6))
    assert judged(people, "kitten", vqa) == (True, None, None)
    box = Sample("a", None, "q", box=(0, 0, 0.5, 0.5))
    assert judged(box, "[0, 0, 0.5, 0.5]", METRICS["anls"]) == (True, 1.0, None)


def test_what_cannot_be_scored() -> None:
    faults = {
        name: metric.fault(Sample("x", None, "q", answers=("2", "3")))
        for name, metric in METRICS.items()
    }
    assert faults["exact"] is faults["relaxed"] is faults["anls"] is None
    assert "has 2 answers, and VQA accuracy compares with those of ten" in str(faults["vqa"])
    assert "'2', which is not the letter of an option" in str(faults["choice"])
    for metric in METRICS.values():
        assert "no answer to compare with" in str(metric.fault(Sample("x", None, "q")))
        assert metric.fault(Sample("x", None, "q", box=(0, 0, 1, 1))) is None
    with pytest.raises(InputError, match="no metric 'bleu'; choose from exact, vqa, relaxed, anls"):
        metric_named("bleu")
