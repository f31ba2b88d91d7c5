"""Text of users is shown in tables, CSV files and pages as it is."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from rich.console import Console

import pore
from helpers.nasty import ANY, NASTY, obeyed
from helpers.pages import checked_page
from pore._text import visible
from pore.bench.results import Spread
from pore.bench.table import table as speed_table
from pore.evaluation import page, survey_page
from pore.evaluation.differences import compare
from pore.evaluation.findings import findings
from pore.evaluation.outcome import Answer, Outcome
from pore.evaluation.parts import results_table
from pore.evaluation.records import FIELDS, GROUPS, to_csv
from pore.evaluation.results import About, Example, Figure, KeptBy
from pore.evaluation.sizes import ImageSizes
from pore.evaluation.tables import table

GRID = (4, 6)
MEAN = 1e-3 * np.exp(0.05 * np.arange(24))


def outcome(text: str, reweight: bool = False) -> Outcome:
    """An outcome whose every text is this one."""
    pruner: Any = SimpleNamespace(
        name=text,
        keep=0.5,
        layer=2,
        reweight=SimpleNamespace(kind=text) if reweight else None,
        looks_at=[1],
        stages=lambda: [SimpleNamespace(layer=1)],
    )
    answer = Answer(text, text, text, text, not reweight, text, text, ((0,),), 1, 0, 1.0)
    return Outcome(pruner, (answer,), budget=text)


def plain_print(shown: Any) -> str:
    """What a console of the user's own, with all that rich does by default, makes of a table."""
    console = Console(width=10_000, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("text", NASTY, ids=repr)
def test_tables_show_text_as_it_is(text: str) -> None:
    records = [outcome(text).record() | {"guide": text}]
    printed = plain_print(table(records, title=text))
    assert not obeyed(printed)
    for line in visible(text, "\n").splitlines():
        # As the title, the budget and the method's name; as kind and third only its beginning.
        assert printed.count(line.strip()) >= 3
        assert line[:5].strip() in printed


@pytest.mark.parametrize(("right", "shown"), [(0, "0.0 [0.0, 35.4]"), (7, "100.0 [64.6, 100.0]")])
def test_intervals_are_printed_whole(right: int, shown: str, tmp_path: Path) -> None:
    """At the ends a Wilson interval lies on one side: 0 of 7 is no 0.0 ± 17.7."""
    one = outcome("m")
    answers = tuple(replace(one.answers[0], right=bool(right)) for _ in range(7))
    records = [replace(one, answers=answers).record()]
    assert shown in plain_print(table(records))
    content = str(results_table(records))
    assert shown in re.sub("<[^>]*>", "", content)
    survey = SimpleNamespace(records=[records[0], records[0]], taught=None, differences=[])
    assert shown in findings(survey)[-1]  # type: ignore[arg-type]
    row = dict(zip(*csv.reader(io.StringIO(to_csv(records))), strict=True))
    assert f"{100 * float(row['ci_low']):.1f}, {100 * float(row['ci_high']):.1f}]" in shown


@pytest.mark.parametrize("text", NASTY, ids=repr)
def test_the_table_of_speeds_shows_text_as_it_is(text: str) -> None:
    spread = Spread((1.0,))
    timing = SimpleNamespace(prefill=spread, ttft=spread, decode=None, cache=1.0, peak_memory=None)
    setting = SimpleNamespace(
        name=text, tokens=[1], timing=timing, attainable=None, flops=SimpleNamespace(total=1.0)
    )
    workload = SimpleNamespace(batch_size=1, text_before=1, visual=1, text_after=1, repeats=1)
    found: Any = SimpleNamespace(
        model={"name": text, "dtype": text, "attention": text},
        workload=workload,
        hardware={"cpu": text},
        settings=[setting],
    )
    printed = plain_print(speed_table(found))
    assert not obeyed(printed)
    assert visible(text, "\n").splitlines()[0].strip()[:30] in printed


@settings(deadline=None)
@given(ANY, ANY)
def test_csv_holds_no_formula(text: str, other: str) -> None:
    record: dict[str, Any] = dict.fromkeys(FIELDS, text)
    record |= {"ci": [-0.1, 0.2], "looks_at": [1, 2], "accuracy": -0.5}
    record |= {"prefill_ms_quartiles": [1.5, 2.5]}
    record |= {f"accuracy_by_{group}": {text: 0.5, other: 0.25} for group in GROUPS}
    record |= {f"ci_by_{group}": {text: [0.1, 0.9], other: [0, 1]} for group in GROUPS}
    content = to_csv([record])
    assert not obeyed(content)
    headings, values = csv.reader(io.StringIO(content))
    several = ("ci", "scores", "prefill_ms_quartiles")
    single = [name for name in FIELDS if "_by_" not in name and name not in several]
    grouped = 3 * len(GROUPS) * (1 if text == other else 2)
    assert len(headings) == len(values) == len(single) + 4 + grouped
    row = dict(zip(headings, values, strict=True))
    assert (row["prefill_ms_q1"], row["prefill_ms_q3"]) == ("1.5", "2.5")
    assert (row["ci_low"], row["accuracy"], row["looks_at"]) == ("-0.1", "-0.5", "1 2")
    numbers = {"ci_low", "accuracy"}
    for heading, value in row.items():
        assert not heading.strip().startswith(tuple("=+-@\t\r"))
        assert heading in numbers or not value.strip().startswith(tuple("=+-@\t\r"))
    assert row["method"] in (text, visible(text), f"'{visible(text)}")


class Tags(HTMLParser):
    """The tags of a page, with their attributes' names, and its text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[Any] = []
        self.text = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def report(text: str, folder: Path) -> str:
    """The page of a demo, all of whose texts are this one."""
    for name in ("figure1", "figure2", "figure3", "example"):
        (folder / f"{name}.png").write_bytes(b"png")
    bias = pore.PositionBias.fit(MEAN, grid=GRID)
    kept = KeptBy(text, text, True, text, b"png")
    first, second = outcome(text), outcome(text, reweight=True)
    found: Any = SimpleNamespace(
        records=[one.record() for one in (first, first, second)],
        differences=[compare(first, second)],
        examples=[Example(text, text, (), (kept, kept), only_ours=True, grid=True)],
        figures=[Figure(text, folder / "figure1.png", b"narrow")],
        over_flops=Figure(text, folder / "figure3.png", b"narrow"),
        left_out={text: text},
        settings=SimpleNamespace(example_keep=text, layer=2, seed=0),
        calibration=SimpleNamespace(count=1),
        bias=bias,
        rope=SimpleNamespace(parameters={"text_tokens": 3}),
    )
    about = About(text, text, text, text, {text: text}, text)
    return page.write_demo(found, about, folder).read_text(encoding="utf-8")


def survey(text: str, folder: Path) -> str:
    """The page of a survey, all of whose texts are this one."""
    first, second = outcome(text), outcome(text, reweight=True)
    bias = pore.PositionBias.fit(MEAN, grid=GRID)
    object.__setattr__(bias.provenance, "host", text)  # which may refuse half a character itself
    found: Any = SimpleNamespace(
        records=[one.record() | {"guide": text} for one in (first, second)],
        differences=[compare(first, second), compare(first, second, third=text)],
        settings=SimpleNamespace(average=False, kind=text, seed=0),
        layers=5,
        sizes=ImageSizes(4, 4, 4, any_size=False),
        biases={text: [bias]},
        left_out=[text],
        reasons=[text],
        taught=1,
    )
    about = About(text, text, text, text, {text: text})
    return survey_page.write_survey(found, about, folder).read_text(encoding="utf-8")


@pytest.mark.parametrize("text", NASTY, ids=repr)
@pytest.mark.parametrize("write", [report, survey])
def test_pages_are_what_they_are_with_harmless_text(
    write: Callable[[str, Path], str], text: str, tmp_path: Path
) -> None:
    content = write(text, tmp_path)
    found, harmless = Tags(content), Tags(write("harmless", tmp_path))
    assert found.tags == harmless.tags
    checked_page(content)
    assert not obeyed(content) - {"\t"}
    shown = visible(text, "\n\t")
    assert found.text.count(shown) >= harmless.text.count("harmless")
