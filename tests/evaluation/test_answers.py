"""Answers compared by their form's meaning; what is an answer and what is none."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pore.data.datasets import from_dataset
from pore.data.files import from_jsonl
from pore.data.samples import Sample
from pore.errors import InputError
from pore.evaluation.answers import is_right, normalise

NUMBERS = st.decimals(-(10**12), 10**12, places=6, allow_nan=False)
EDGES = st.text(" \t\n\"'`.,;:!?", max_size=4)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (".5", "0.5", True),
        (".5", "5", False),
        ("5.", "5", True),
        ("0.50", "0.5", True),
        ("'.5'.", "0.5", True),
        ("...5", "5", True),
        ("-3", "3", False),
        ("-3", "−3.0", True),
        ("+3", "3", True),
        ("-0", "0", True),
        ("1,000", "1000", True),
        ("1,000,000.0", "1000000", True),
        ("1,5", "15", False),
        ("1,5", "1.5", False),
        ("0,500", "500", False),
        ("12,34", "1234", False),
        ("1e3", "1000", True),
        ("1e-05", "0.00001", True),
        ("1e9999", "0", False),
        ("50 %", "50%", True),
        ("50%", "50.0 %.", True),
        ("50%", "50", False),
        ("50%", "0.5", False),
        ("007", "7", True),
        ("1.2.3", "1.23", False),
        ("3:30", "330", False),
        ("$5", "5", False),
        ("0.50 m", "0.5 m", False),
        (".", "!", False),
        (".", ".", True),
        (" . ", ".", True),
        ("...", "\u2026", True),
        ("", ".", False),
        ("?", "", False),
        ("True", "true", True),
        ("true", "1", False),
        ("\u0663", "3", True),
    ],
)
def test_pairs(one: str, other: str, same: bool) -> None:
    assert is_right(one, other) is is_right(other, one) is same


@given(NUMBERS, NUMBERS)
def test_numbers_are_equal_where_they_are(one: Decimal, other: Decimal) -> None:
    assert is_right(f"{one:f}", f"{other:f}") is (one == other)


@given(NUMBERS, EDGES.filter(lambda text: not text.endswith(".")), EDGES)
def test_numbers_however_they_are_written(number: Decimal, before: str, after: str) -> None:
    plain = f"{number:f}"
    for text in (
        plain,
        plain + "000",
        f"{number:,f}",
        f"{number:e}",
        re.sub(r"^(-?)0\.", r"\1.", plain),
    ):
        assert is_right(text, plain), text
        assert is_right(before + text + after, plain)


@given(st.one_of(st.text(), st.text("0123456789.,+-−e% !'\n½²٣Ii̇KSſß")))
def test_a_normal_form_is_normal(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)
    assert is_right(text, text)
    assert bool(normalise(text)) is bool(text.strip())


# -- what is an answer --------------------------------------------------------------------------

MISSING = [None, float("nan"), np.nan, np.float32("nan"), pd.NaT, pd.NA, np.datetime64("NaT")]
MISSING += [Decimal("NaN"), "", "  \n"]
WRITTEN: list[tuple[Any, str]] = [
    (3, "3"),
    (3.0, "3"),
    (-0.0, "0"),
    (0.1, "0.1"),
    (np.float32(0.1), "0.1"),
    (np.float64(2), "2"),
    (np.int64(-7), "-7"),
    (np.uint8(7), "7"),
    (1e-5, "1e-05"),
    (1e300, "1e+300"),
    (10**30, "1" + "0" * 30),
    (True, "True"),
    (np.bool_(False), "False"),
    (Decimal("1.50"), "1.50"),
    ("nan", "nan"),
    ("0.50", "0.50"),
    (np.str_("x"), "x"),
]
REFUSED = [float("inf"), -np.inf, np.float32("inf"), {"a": 1}, b"x", 1j, [["a"]], object]


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_missing_answers(value: Any) -> None:
    assert Sample("a", None, "q", value).answer is None
    assert Sample("a", None, "q", "x", value, value) == Sample("a", None, "q", "x")
    assert [s.answer for s in rows([value])] == [None]
    assert [s.answer for s in rows([[value, "x", value]])] == ["x"]
    assert [s.answer for s in rows([[value]])] == [None]


@pytest.mark.parametrize(("value", "text"), WRITTEN, ids=repr)
def test_written_answers(value: Any, text: str) -> None:
    assert Sample("a", None, "q", value).answer == text
    assert [s.answer for s in rows([value])] == [text]
    assert [s.answer for s in rows([[value, value, "other"]])] == [text]


@pytest.mark.parametrize("value", REFUSED, ids=repr)
def test_what_is_no_answer(value: Any) -> None:
    with pytest.raises(InputError, match="The answer of sample a must be a text or a finite"):
        Sample("a", None, "q", value)
    with pytest.raises(InputError, match=r"Row 0 .*'answer' holds no text: it must be"):
        rows([value])


class Stream(datasets.IterableDataset):
    """Rows as they are, which Arrow would change."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __iter__(self) -> Any:
        return iter({"image": None, "question": "q", "answer": value} for value in self.values)

    column_names = ["image", "question", "answer"]  # noqa: RUF012 - as datasets has it
    features = None


def rows(values: list[Any]) -> list[Sample]:
    return list(from_dataset(Stream(values)))


def test_lists_of_answers() -> None:
    assert [s.answer for s in rows([[], (), np.array(["a", "b", "b"]), [3, 3.0, 4]])] == [
        None,
        None,
        "b",
        "3",
    ]


def test_pandas_columns() -> None:
    frame = pd.DataFrame({"image": ["a.png"] * 3, "question": ["q"] * 3, "answer": [1, None, 2.5]})
    made = from_dataset(datasets.Dataset.from_pandas(frame))
    assert [s.answer for s in made] == ["1", None, "2.5"]


def test_lines(tmp_path: Path) -> None:
    values = [3, 3.0, 0.1, True, "x", float("nan"), None, [], "", "nan"]
    lines = [{"image": "a.png", "question": "q", "answer": value} for value in values]
    file = tmp_path / "s.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    texts = ["3", "3", "0.1", "True", "x", None, None, None, None, "nan"]
    assert [s.answer for s in from_jsonl(file)] == texts
    file.write_text('{"image": "a", "question": "q", "id": NaN, "kind": NaN, "third": ""}')
    assert from_jsonl(file) == [Sample("s.jsonl:1", tmp_path / "a", "q")]
    for wrong in ("Infinity", "[[1]]", "[{}]", "{}", "1e999"):
        file.write_text(f'{{"image": "a", "question": "q", "answer": {wrong}}}')
        with pytest.raises(InputError, match="line 1: "):
            from_jsonl(file)
